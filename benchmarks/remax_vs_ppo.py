"""An iteration of ReMax against one of PPO: time, and peak memory of training, at the same batch.

    python benchmarks/remax_vs_ppo.py [--blocks 5] [--steps 4] [--output FILE]

Same model, prompts, reward, samples per prompt and completion lengths, float32, both with one rollout engine. ReMax
decodes one greedy completion more per prompt; PPO has a critic of the policy's size: its values, its training and its
optimiser. PPO goes over each rollout once (`num_iterations: 1`, the cheapest; the ReMax paper compares like this) and,
beside it, four times (its usual setting). Time: blocks of iterations in turn in one process, median per block. Memory:
each method in a process of its own, with transformers' generation, which shares the policy's weights; the peak of the
resident set over what it was once the libraries were loaded.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from on_policy_worlds import (
    SHAPE,
    StepClock,
    even_words,
    make_model,
    make_prompts,
    make_tokenizer,
    phase_means,
    save,
    spread,
)

from trainers.ppo import PPOConfig, PPOTrainer
from trainers.remax import ReMaxConfig, ReMaxTrainer

RESULT = Path(__file__).parent / "results" / "remax_vs_ppo.json"
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
SIDES = ("remax", "ppo, 1 pass", "ppo, 4 passes")


def make(side: str, backend: str, args, folder: str, steps: int, **shape):
    options = {
        "output_dir": folder,
        "per_device_train_batch_size": args.prompts // args.accumulation,
        "gradient_accumulation_steps": args.accumulation,
        "max_prompt_length": args.prompt_tokens,
        "max_completion_length": args.tokens,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "beta": 0.05,
        "rollout_backend": backend,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "max_steps": steps,
    }
    tokenizer = make_tokenizer(args.vocabulary)
    data = make_prompts(256, args.prompt_tokens, args.vocabulary)
    model = make_model(tokenizer, **shape)
    if side == "remax":
        return ReMaxTrainer(model, even_words, ReMaxConfig(**options), data, processing_class=tokenizer)
    passes = 1 if side == "ppo, 1 pass" else 4
    config = PPOConfig(**{**options, "num_iterations": passes, "max_steps": steps * passes})
    return PPOTrainer(model, even_words, config, data, processing_class=tokenizer)


def block(side: str, args, folder: str) -> dict:
    """Seconds per iteration (a rollout and all of its updates), and the phases of one iteration."""
    trainer, clock = make(side, "vllm", args, folder, args.steps + 1), StepClock()
    passes = trainer.args.steps_per_rollout
    trainer.add_callback(clock)
    trainer.train()
    trainer.close()
    seconds = clock.seconds[passes - 1 :]  # the first rollout builds the engine
    seconds = [sum(seconds[i : i + passes]) for i in range(0, len(seconds) - passes + 1, passes)]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][passes:]
    phases = sorted({name for entry in logs for name in entry if name.startswith("time/")})
    return {
        "seconds": sorted(seconds)[len(seconds) // 2],
        "phases": {name: sum(entry.get(name, 0.0) for entry in logs) / len(seconds) for name in phases},
    }


def peak_memory(side: str, args) -> None:
    """Run by a process of its own: prints MiB over what the libraries take."""
    with tempfile.TemporaryDirectory() as folder:
        torch.ones(1).requires_grad_().sum().backward()
        before = resident()
        trainer = make(side, "transformers", args, folder, 2, **LARGE)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="measured iterations per block")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--memory_of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.memory_of:
        peak_memory(args.memory_of, args)
        return

    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.blocks):
            order = SIDES[number % 3 :] + SIDES[: number % 3]
            measured.append({side: block(side, args, folder) for side in order})
            print({side: round(value["seconds"], 3) for side, value in measured[-1].items()}, flush=True)
    memory = {side: measure_memory(side, sys.argv[1:]) for side in SIDES[:2]}

    report = {
        "time_ratio_1_pass": spread([m["remax"]["seconds"] / m["ppo, 1 pass"]["seconds"] for m in measured]),
        "time_ratio_4_passes": spread([m["remax"]["seconds"] / m["ppo, 4 passes"]["seconds"] for m in measured]),
        "memory_ratio": round(memory["remax"]["mib"] / memory["ppo, 1 pass"]["mib"], 3),
        "seconds_per_iteration": {side: [round(m[side]["seconds"], 4) for m in measured] for side in SIDES},
        "phases": {side: phase_means(measured, side) for side in SIDES},
        "memory": memory,
    }
    save(report, args, {"time": SHAPE, "memory": {**SHAPE, **LARGE}}, args.output)
    print(f"memory_ratio         {report['memory_ratio']:.2f}")


if __name__ == "__main__":
    main()
