"""What `VLLMEngine.generate` costs on top of calling `vllm.LLM.generate` directly.

    python benchmarks/rollout_overhead.py [--repetitions 11] [--prompts 64] [--tokens 64] [--output FILE]

One vLLM engine serves both sides in one process, in turns, on the same prompts: half are sampled, half greedy, as ReMax
asks for them. The direct side is at its best: parameter objects made beforehand, outside the clock; log-probs of the
drawn token only, as flat lists; no detokenisation; the same uncompiled sampler (on CPUs the compiled one is slower).
It is measured with the same per-request seeds as ours (then both must draw the same tokens, which is checked), and
without seeds, which is less work for vLLM. A ratio is one repetition's time of ours over that of the direct side, by
the wall clock and in processor time (which other work on the machine disturbs less).
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

from align.rollout import SamplingParams
from align.rollout.vllm_engine import VLLMEngine
from align.rollout.vllm_requests import vllm_params

RESULT = Path(__file__).parent / "results" / "rollout_overhead.json"
SHAPE = {
    "vocab_size": 289,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def timed(function) -> tuple[dict[str, float], object]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def direct_call(engine: VLLMEngine, prompts: list[list[int]], params: list):
    """As a user of vLLM would write it; the result stays in vLLM's objects."""
    with torch.compiler.set_stance("force_eager"):
        return engine._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def parameters(engine: VLLMEngine, prompts, params, seeded: bool) -> list:
    """vLLM's parameters for the next call of `engine.generate(prompts, params)`, without making it."""
    calls = engine.calls
    requests = engine._requests(prompts, params)
    engine.calls = calls
    for request in requests:
        request.seed = request.seed if seeded else None
    return [vllm_params(request) for request in requests]


def repetition(engine: VLLMEngine, prompts, params, order: list[str]) -> dict[str, dict[str, float]]:
    """Seconds by variant and clock; `order`: the variants in the order in which they are run."""
    prepared = {
        "direct": parameters(engine, prompts, params, seeded=True),
        "direct_unseeded": parameters(engine, prompts, params, seeded=False),
    }
    seconds, tokens = {}, {}
    for variant in order:
        engine._llm.reset_prefix_cache()
        if variant == "ours":
            seconds[variant], rollouts = timed(lambda: engine.generate(prompts, params))
            tokens[variant] = [rollout.completions[0].token_ids for rollout in rollouts]
        else:
            ready = prepared[variant]
            seconds[variant], outputs = timed(lambda ready=ready: direct_call(engine, prompts, ready))
            tokens[variant] = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens["ours"] == tokens["direct"], "both sides must have drawn the same tokens"
    return seconds


def ratio(measured: list[dict], base: str, clock: str) -> dict[str, float]:
    return spread([m["ours"][clock] / m[base][clock] for m in measured])


def spread(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4)
    numbers = {"median": statistics.median(values), "q1": quarters[0], "q3": quarters[2], "min": min(values)}
    return {name: round(value, 4) for name, value in {**numbers, "max": max(values)}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--prompts", type=int, default=64, help="requests per call, half sampled and half greedy")
    parser.add_argument("--prompt_tokens", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per request")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=None, bos_token_id=None))
    engine = VLLMEngine(model, max_model_len=args.prompt_tokens + args.tokens)
    sampled, greedy = SamplingParams(args.tokens), SamplingParams(args.tokens, temperature=0)
    params = [sampled, greedy] * (args.prompts // 2)
    variants = ["direct", "ours", "direct_unseeded"]
    measured = []
    for number in trange(-2, args.repetitions, desc="Measuring"):  # the first two warm up
        pairs = torch.randint(SHAPE["vocab_size"], (args.prompts // 2, args.prompt_tokens)).tolist()
        prompts = [ids for ids in pairs for _ in range(2)]
        shift = number % len(variants)
        measured.append(repetition(engine, prompts, params, variants[shift:] + variants[:shift]))
    measured = measured[2:]
    engine.close()

    report = {
        "ratio": ratio(measured, "direct", "wall"),
        "ratio_cpu": ratio(measured, "direct", "cpu"),
        "ratio_to_unseeded": ratio(measured, "direct_unseeded", "wall"),
        "ratio_cpu_to_unseeded": ratio(measured, "direct_unseeded", "cpu"),
        "seconds": {variant: [round(m[variant]["wall"], 4) for m in measured] for variant in variants},
        "workload": {
            "requests": args.prompts,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.tokens,
            "sampled": "every second request, temperature 1; the others greedy",
            "model": {**SHAPE, "parameters": sum(p.numel() for p in model.parameters()), "dtype": "float32"},
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
            "vllm": __import__("vllm").__version__,
        },
        "threads": torch.get_num_threads(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    for name, values in report.items():
        if name.startswith("ratio"):
            print(f"{name:22s} " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
