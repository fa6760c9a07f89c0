"""Step time of on-policy training from 1 to 1,024 GPUs, computed: what generates, what trains, what moves.

    python benchmarks/scaling.py [--output FILE]

A model of a step of RLOO (`num_generations` samples per prompt, FSDP2, vLLM servers), not a measurement: nobody has run
the library on more than one GPU. `MEASURED` holds what was measured on one H200 or on a processor, with the file that
says so; `ASSUMED` holds what was not. docs/scaling.md reads the table.

Per step, with S samples of C tokens after prompts of P tokens, G_t GPUs that train and G_e that generate:

    generate   decoding reads the weights and the keys and values of all live samples once per token, and computes
               2 N flops per sample and token; the slower of the two. A server has `tensor_parallel` GPUs. Drawing ends
               with the longest sample, of `longest` x C tokens; live samples fall linearly from C on.
    forward    passes without gradients (reference, old log-probs): 2 N flops per token each
    train      (6 + 2 t) N flops per token: forward, again (gradient checkpointing), gradients of the inputs, and of the
               share t of the weights that is trained
    shards     FSDP2 per micro-batch: weights gathered for the forward and the backward pass, gradients reduced once
               (2 + 2 + 4 bytes per parameter); the part that is longer than the computation is waited for
    push       the weights that are trained, gathered, written and read once per machine, with the proof of each tensor
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "scaling.json"

MEASURED = {
    "matmul": (771.6e12, "flop/s in bfloat16, one H200: results/gpu_h200.jsonl, stage machine"),
    "memory": (4148e9, "bytes/s read and written, one H200: the same"),
    "mfu": (0.131, "DPO of a 0.5B model, one H200: the same, stage pairs; larger models reach more"),
    "push": (
        1.48e9,
        "bytes/s, 0.54 GB with proof in 0.364 s, in process, one processor thread: results/push_cost.json",
    ),
}
ASSUMED = {
    "decode_share": (0.6, "of the memory's bandwidth that decoding reaches"),
    "prefill_mfu": (0.4, "of a pass over prompts or samples without gradients"),
    "inside": (300e9, "bytes/s of a GPU to the others of its machine (NVLink)"),
    "between": (40e9, "bytes/s of a GPU to other machines (400 Gb/s each, 80 %)"),
    "gpus_per_machine": (8, ""),
    "tokens_per_batch": (16_384, "per GPU and micro-batch"),
    "longest": (2.0, "the longest sample, in mean lengths"),
}
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Run:
    """parameters: N. kv_bytes: keys and values of one token, all layers. trained: share of N that is trained.
    memory_needed: bytes of weights, gradients, optimiser and reference together. prompts: per step, each with
    `num_generations` samples."""

    name: str
    parameters: float
    kv_bytes: float
    trained: float
    tensor_parallel: int
    memory_needed: float
    prompts: int = 128
    num_generations: int = 8
    prompt_tokens: int = 256
    completion_tokens: int = 1024

    @property
    def samples(self) -> int:
        return self.prompts * self.num_generations

    @property
    def tokens(self) -> float:
        return self.prompts * self.prompt_tokens + self.samples * self.completion_tokens


# Qwen2.5-7B: 28 layers, 4 key-value heads of 128; Llama-3.1-70B: 80 layers, 8 of 128. LoRA of rank 16 is 0.3 % of it.
RUNS = (
    Run("7B, all weights", 7.6e9, 2 * 2 * 28 * 4 * 128, 1.0, 1, 20 * 7.6e9),
    Run("70B, LoRA", 70.6e9, 2 * 2 * 80 * 8 * 128, 0.003, 4, 2.3 * 70.6e9),
)


def constant(name: str, other: dict[str, float] | None = None) -> float:
    return (other or {}).get(name, (MEASURED | ASSUMED)[name][0])


def generate(run: Run, gpus: int, given: dict[str, float] | None = None) -> float:
    """Seconds until the longest sample is drawn. Samples are divided over the servers."""
    servers = max(1, gpus // run.tensor_parallel)
    each, live = min(run.tensor_parallel, gpus), run.samples / servers
    memory = each * constant("memory", given) * constant("decode_share", given)
    compute = each * constant("matmul", given) * constant("prefill_mfu", given)
    longest = round(constant("longest", given) * run.completion_tokens)
    prefill = 2 * run.parameters * run.prompts / servers * run.prompt_tokens / compute
    seconds, pieces = prefill, 64
    for i in range(pieces):  # the live samples halve the remaining length linearly: their mean is C
        position = (i + 0.5) / pieces * longest
        now = live * max(1 / live, 1 - position / longest)
        read = (2 * run.parameters + now * (run.prompt_tokens + position) * run.kv_bytes) / memory
        seconds += longest / pieces * max(read, 2 * run.parameters * now / compute)
    return seconds


def train(run: Run, gpus: int, given: dict[str, float] | None = None) -> dict[str, float]:
    """Seconds of the passes without gradients, of training, and of waiting for shards. Per GPU."""
    share = run.tokens / gpus
    peak = constant("matmul", given)
    forward = 2 * 2 * run.parameters * share / (peak * constant("prefill_mfu", given))
    step = (6 + 2 * run.trained) * run.parameters * share / (peak * constant("mfu", given))
    micro_batches = max(1.0, share / constant("tokens_per_batch", given))
    link = constant("inside" if gpus <= constant("gpus_per_machine", given) else "between", given)
    moved = (2 + 2 + 4 * run.trained) * run.parameters * (1 - 1 / gpus)
    waited = max(0.0, micro_batches * moved / link - step)
    return {"forward": forward, "train": step, "shards": waited}


def push(run: Run, gpus: int, given: dict[str, float] | None = None) -> float:
    """Seconds. An adapter goes as an adapter to servers of one GPU, merged (all weights) to tensor-parallel ones."""
    sent = 2 * run.parameters * (run.trained if run.tensor_parallel == 1 else 1.0)
    return sent / constant("push", given) + sent / constant("inside", given)


def step(run: Run, gpus: int, given: dict[str, float] | None = None) -> dict | None:
    """The best division of the GPUs, in servers of `tensor_parallel` GPUs; None where the run does not fit.

    One GPU does both in turn. From two on, `ahead` is the step with `rollouts_ahead: 1`: generation and training run at
    the same time, and the longer one counts."""
    choices = []
    if gpus == 1:
        divisions = [(1, 1)]
    else:
        divisions = [(gpus - e, e) for e in range(run.tensor_parallel, gpus, run.tensor_parallel)]
    for trainers, engines in divisions:
        if run.memory_needed / trainers + (30e9 if gpus > 1 else 2 * run.parameters + 20e9) > 141e9:
            continue
        parts = {"generate": generate(run, engines, given), **train(run, trainers, given)}
        parts["push"] = push(run, trainers, given)
        trained = parts["forward"] + parts["train"] + parts["shards"]
        one_by_one = parts["generate"] + trained + parts["push"]
        ahead = one_by_one if gpus == 1 else max(parts["generate"], trained) + parts["push"]
        choices.append({"trainers": trainers, "servers": engines, **parts, "step": one_by_one, "ahead": ahead})
    return min(choices, key=lambda found: found["ahead"]) if choices else None


def table(run: Run, given: dict[str, float] | None = None) -> dict[int, dict | None]:
    return {gpus: step(run, gpus, given) for gpus in GPUS}


def all_tables() -> dict[str, dict[int, dict | None]]:
    """By run and way to send weights."""
    ways = {"as it is": None, "weights sent at 20 GB/s": {"push": 20e9}}
    return {f"{run.name}; {way}": table(run, given) for run in RUNS for way, given in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    found = {}
    for name, rows in all_tables().items():
        found[name] = {g: row and {key: round(value, 2) for key, value in row.items()} for g, row in rows.items()}
        print(f"\n{name}\n GPUs train serve generate forward   train  shards    push    step   ahead")
        for gpus, row in rows.items():
            if row is None:
                print(f"{gpus:5} does not fit")
                continue
            columns = ("generate", "forward", "train", "shards", "push", "step", "ahead")
            seconds = " ".join(f"{row[key]:7.1f}" for key in columns)
            print(f"{gpus:5} {row['trainers']:5} {row['servers']:5} {seconds}")
    constants = {name: {"value": v, "source": s} for name, (v, s) in {**MEASURED, **ASSUMED}.items()}
    args.output.write_text(json.dumps({"constants": constants, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
