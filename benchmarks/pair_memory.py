"""Peak memory of a DPO or TDPO step with a large vocabulary: in tiles of the vocabulary, and with whole logits.

    python benchmarks/pair_memory.py [--vocabulary 131072] [--pairs 8] [--output FILE]

Each side runs one forward and backward pass in a process of its own, on the same randomly drawn Llama, reference and
pairs. The whole side is the plain computation: logits of the completion tokens alone (already fewer than a padded
batch has), their log_softmax, a gather, and for the KL the sum over the vocabulary; autograd does the rest. Both give
the same loss and gradient norm, which is checked. Peaks are the kernel's high-water mark of the resident set, of the
process as a whole and beyond what it held before the step (weights, libraries, batch).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "pair_memory.json"
TARGET = 0.35


def whole_values(model, batch):
    """log-probs [completion tokens, vocabulary]."""
    from align.modeling.pairs import completions, pair_inputs

    places = completions(batch)
    core = model.model(**{k: v for k, v in pair_inputs(model, batch).items() if k != "use_cache"}, use_cache=False)
    hidden = core.last_hidden_state.flatten(0, 1)[places.sources[places.mask]]
    return model.lm_head(hidden).float().log_softmax(-1)


def step(policy, reference, batch, whole: bool, kl: bool):
    """Loss of the pairs, from sums over their tokens."""
    import torch

    from align.modeling.pairs import PairTokens, completions, pair_tokens, pair_tokens_with_kl

    if whole:
        places = completions(batch)
        ids = places.ids[places.mask][:, None]
        rows = lambda values: values.new_zeros(places.mask.shape).masked_scatter(places.mask, values)  # noqa: E731
        with reference.active() as ref_model:
            log_q = whole_values(ref_model, batch)
            ref = PairTokens(rows(log_q.gather(-1, ids)[:, 0]), places.mask)
            if not kl:
                del log_q
        log_p = whole_values(policy, batch)
        divergence = rows((log_q.exp() * (log_q - log_p)).sum(-1)) if kl else None
        tokens = PairTokens(rows(log_p.gather(-1, ids)[:, 0]), places.mask, divergence)
    elif kl:
        tokens, ref = pair_tokens_with_kl(policy, reference, batch)
    else:
        with reference.active() as ref_model:
            ref = pair_tokens(ref_model, batch)
        tokens = pair_tokens(policy, batch)
    score = (tokens.logps - ref.logps).sum(-1)
    if kl:
        score = score + tokens.kl.sum(-1)
    chosen, rejected = score.chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()
    return loss


def measure(args) -> dict:
    """In this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.data import PairCollator
    from align.modeling.load import reference_of
    from align.modeling.logprobs import language_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=2 * args.hidden,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    policy = LlamaForCausalLM(config)
    reference = reference_of(policy, LlamaForCausalLM(config))
    draw = lambda n: torch.randint(args.vocabulary, (n,)).tolist()  # noqa: E731
    rows = [
        {"prompt_ids": draw(args.prompt), "chosen_ids": draw(args.completion), "rejected_ids": draw(args.completion)}
        for _ in range(args.pairs)
    ]
    batch = PairCollator(0)(rows)
    language_model(policy)  # what it imports is no part of the step
    before = resident()
    loss = step(policy, reference, batch, args.side == "whole", args.kl)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    norm = torch.stack([p.grad.double().square().sum() for p in policy.parameters()]).sum().sqrt()
    return {"peak": peak, "before": before, "step": peak - before, "loss": loss.item(), "gradient_norm": norm.item()}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_own_process(args, side: str, kl: bool) -> dict:
    shape = [f"--{name}={getattr(args, name)}" for name in ("vocabulary", "pairs", "prompt", "completion", "hidden")]
    command = [sys.executable, __file__, "--side", side, *(["--kl"] if kl else []), *shape]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def compare(args, kl: bool) -> dict:
    whole, tiles = (in_own_process(args, side, kl) for side in ("whole", "tiles"))
    for name in ("loss", "gradient_norm"):
        if abs(whole[name] - tiles[name]) > 1e-4 * abs(whole[name]):
            raise SystemExit(f"the two sides differ in {name}: {whole[name]} and {tiles[name]}")
    mebibytes = {
        side: {name: round(found[name] / 2**20) for name in ("before", "peak", "step")}
        for side, found in (("whole", whole), ("tiles", tiles))
    }
    return {
        "mebibytes": mebibytes,
        "ratio_of_peaks": round(tiles["peak"] / whole["peak"], 3),
        "ratio_of_steps": round(tiles["step"] / whole["step"], 3),
        "loss": tiles["loss"],
        "gradient_norm": tiles["gradient_norm"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--completion", type=int, default=96, help="tokens of each completion")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--side", choices=["whole", "tiles"], help=argparse.SUPPRESS)
    parser.add_argument("--kl", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    shape = {name: getattr(args, name) for name in ("vocabulary", "pairs", "prompt", "completion", "hidden")}
    report = {
        "measured": {**shape, "layers": 2, "completion_tokens": 2 * args.pairs * args.completion, "dtype": "float32"},
        "target": TARGET,
        "log_probs": compare(args, kl=False),
        "log_probs_and_kl": compare(args, kl=True),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    for name in ("log_probs", "log_probs_and_kl"):
        print(name, {k: v for k, v in report[name].items() if k.startswith(("ratio", "meb"))})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
