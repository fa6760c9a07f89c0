"""An iteration of ReMax against one of PPO: time, and peak memory of training, at the same batch.

    python benchmarks/remax_vs_ppo.py [--workload fixed data] [--blocks 5] [--memory] [--output FILE]

Same model, prompts, reward, samples per prompt and completion lengths, float32, both with one rollout engine. ReMax
decodes one greedy completion more per prompt; PPO has a critic of the policy's size: its values, its training and its
optimiser. Two workloads (`worlds.on_policy.workload`): `fixed`, prompts of 32 tokens and completions of 96, and `data`,
the lengths of real prompts and answers (`--pairs`). PPO goes over each rollout once (`num_iterations: 1`, the cheapest;
the ReMax paper compares like this) and, beside it, four times (its usual setting). Time: blocks of iterations in turn
in one process, median per block. Memory (`--memory`): each method in a process of its own, on `fixed`, with
transformers' generation, which has its own copy of the policy's weights; the peak of the resident set over what it was
once the libraries were loaded.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from worlds.on_policy import (
    DATA,
    SHAPE,
    StepClock,
    even_words,
    make_model,
    make_prompts,
    make_tokenizer,
    phase_means,
    save,
    sizes,
    spread,
    workload,
)

from align.trainers.ppo import PPOConfig, PPOTrainer
from align.trainers.remax import ReMaxConfig, ReMaxTrainer

RESULT = Path(__file__).parent / "results" / "remax_vs_ppo.json"
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
SIDES = ("remax", "ppo, 1 pass", "ppo, 4 passes")


def make(side: str, backend: str, world, args, folder: str, steps: int, **shape):
    options = {
        "output_dir": folder,
        "per_device_train_batch_size": args.prompts // args.accumulation,
        "gradient_accumulation_steps": args.accumulation,
        "max_prompt_length": world.max_prompt_length,
        "max_completion_length": world.max_completion_length,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "beta": 0.05,
        "rollout": backend,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "max_steps": steps,
    }
    tokenizer = make_tokenizer(args.vocabulary)
    data = make_prompts(256, world.prompt_lengths, args.vocabulary)
    model = make_model(tokenizer, world.end, **shape)
    if side == "remax":
        return ReMaxTrainer(model, even_words, ReMaxConfig(**options), data, processing_class=tokenizer)
    passes = 1 if side == "ppo, 1 pass" else 4
    config = PPOConfig(**{**options, "num_iterations": passes, "max_steps": steps * passes})
    return PPOTrainer(model, even_words, config, data, processing_class=tokenizer)


def block(side: str, world, args, folder: str) -> dict:
    """Seconds per iteration (a rollout and all of its updates), and the phases of one iteration."""
    trainer, clock = make(side, args.backend, world, args, folder, args.steps + 1, **sizes(args)), StepClock()
    passes = trainer.args.steps_per_rollout
    trainer.add_callback(clock)
    trainer.train()
    trainer.close()
    seconds, processor = (per_iteration(each, passes) for each in (clock.seconds, clock.processor_seconds))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][passes:]
    phases = sorted({name for entry in logs for name in entry if name.startswith("time/")})
    return {
        "clock": sorted(seconds)[len(seconds) // 2],
        "processor": sorted(processor)[len(seconds) // 2],
        "length": sum(entry["completions/mean_length"] for entry in logs if "reward" in entry) / len(seconds),
        "padding": max(entry["padding"] for entry in logs),
        "phases": {name: sum(entry.get(name, 0.0) for entry in logs) / len(seconds) for name in phases},
    }


def per_iteration(steps: list[float], passes: int) -> list[float]:
    """Seconds of each rollout with its updates; the first rollout builds the engine."""
    steps = steps[passes - 1 :]
    return [sum(steps[i : i + passes]) for i in range(0, len(steps) - passes + 1, passes)]


def peak_memory(side: str, args) -> None:
    """Run by a process of its own: prints MiB over what the libraries take."""
    with tempfile.TemporaryDirectory() as folder:
        torch.ones(1).requires_grad_().sum().backward()
        before = resident()
        trainer = make(side, "transformers", workload("fixed", args.pairs), args, folder, 2, **LARGE)
        trainer.train()
        parameters = sum(p.numel() for p in trainer.model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"mib": peak - before, "parameters": parameters}))


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure_memory(side: str, argv: list[str]) -> dict:
    command = [sys.executable, __file__, *argv, "--memory_of", side]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.strip().splitlines()[-1])


def measure(world, args, folder: str) -> dict:
    """Rounds of blocks in turn, each round in another order."""
    rounds, sides = [], args.sides
    for number in range(args.blocks):
        first = number % len(sides)
        rounds.append({side: block(side, world, args, folder) for side in sides[first:] + sides[:first]})
        print({side: round(value["processor"], 3) for side, value in rounds[-1].items()}, flush=True)
    ratios = {"1_pass": "ppo, 1 pass", "4_passes": "ppo, 4 passes"}
    return {
        **{
            f"ratio_{name}_{clock}": spread([r["remax"][clock] / r[side][clock] for r in rounds])
            for name, side in ratios.items()
            for clock in ("processor", "clock")
            if side in sides
        },
        "seconds_per_iteration": {side: [round(r[side]["clock"], 4) for r in rounds] for side in sides},
        "processor_seconds_per_iteration": {side: [round(r[side]["processor"], 4) for r in rounds] for side in sides},
        "tokens_per_completion": {side: statistics.mean(r[side]["length"] for r in rounds) for side in sides},
        "padding": {side: max(r[side]["padding"] for r in rounds) for side in sides},
        "phases": {side: phase_means(rounds, side) for side in sides},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=("fixed", "data"), default=["fixed", "data"])
    parser.add_argument("--pairs", type=Path, default=DATA, help="pairs whose lengths `data` has")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="vllm")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="measured iterations per block")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--memory", action="store_true", help="measure the memory too")
    parser.add_argument("--memory_of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.memory_of:
        peak_memory(args.memory_of, args)
        return

    with tempfile.TemporaryDirectory() as folder:
        report = {name: measure(workload(name, args.pairs), args, folder) for name in args.workload}
    if args.memory:
        memory = {side: measure_memory(side, sys.argv[1:]) for side in SIDES[:2]}
        report |= {"memory_ratio": round(memory["remax"]["mib"] / memory["ppo, 1 pass"]["mib"], 3), "memory": memory}
    save(report, args, {"time": sizes(args), "memory": {**SHAPE, **LARGE}}, args.output)


if __name__ == "__main__":
    main()
