"""A step of RLOO against TRL's RLOOTrainer: same model, prompts, completion lengths, reward and optimiser.

    python benchmarks/rloo_vs_trl.py [--blocks 5] [--steps 4] [--output FILE]

Two comparisons in one run, in alternating blocks of steps:

    best engine    ours with vLLM in process, TRL with transformers' generation: its vLLM path needs CUDA
    same engine    both with transformers' generation

Both sides take the same prompts and samples per step in one micro-batch, in float32 and without gradient checkpointing.
A ratio is TRL's median step time of a block over ours of the neighbouring block. Completions end at the length limit or
at a random end token, one in `--vocabulary` per token, for both alike.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow both sides down

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

RESULT = Path(__file__).parent / "results" / "rloo_vs_trl.json"


def shared_options(folder: str, args) -> dict:
    return {
        "output_dir": folder,
        "max_steps": args.steps + 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "num_generations": args.generations,
        "max_completion_length": args.tokens,
        "beta": 0.05,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 0,
    }


def ours(backend: str, tokenizer, data, args, folder: str):
    from trainers.rloo import RLOOConfig, RLOOTrainer

    config = RLOOConfig(
        **shared_options(folder, args),
        per_device_train_batch_size=args.prompts,
        max_prompt_length=args.prompt_tokens,
        rollout_backend=backend,
    )
    return RLOOTrainer(make_model(tokenizer), even_words, config, data, processing_class=tokenizer)


def theirs(tokenizer, data, args, folder: str):
    from trl import RLOOConfig, RLOOTrainer

    config = RLOOConfig(
        **shared_options(folder, args), per_device_train_batch_size=args.prompts * args.generations, use_vllm=False
    )
    source = Path(folder) / "model"  # TRL loads the reference from where the policy came from
    make_model(tokenizer).save_pretrained(source)
    return RLOOTrainer(str(source), even_words, config, data, processing_class=tokenizer)


def block(make, key: str) -> dict:
    """One trainer's steps: seconds per step, tokens per completion, and where our time goes."""
    trainer, clock = make(), StepClock()
    trainer.add_callback(clock)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][1:]
    phases = {name for entry in logs for name in entry if name.startswith("time/")}
    if hasattr(trainer, "close"):
        trainer.close()
    return {
        "side": key,
        "step": sorted(clock.seconds)[len(clock.seconds) // 2],
        "length": sum(entry["completions/mean_length"] for entry in logs) / len(logs),
        "phases": {name: sum(entry.get(name, 0.0) for entry in logs) / len(logs) for name in sorted(phases)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="measured steps per block")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()

    tokenizer = make_tokenizer(args.vocabulary)
    data = make_prompts(256, args.prompt_tokens, args.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "ours, vLLM": lambda: ours("vllm", tokenizer, data, args, folder),
            "TRL": lambda: theirs(tokenizer, data, args, folder),
            "ours, transformers": lambda: ours("transformers", tokenizer, data, args, folder),
        }
        measured = []
        for number in range(args.blocks):
            order = list(sides)[number % 3 :] + list(sides)[: number % 3]
            measured.append({key: block(sides[key], key) for key in order})
            print({key: round(value["step"], 3) for key, value in measured[-1].items()}, flush=True)

    report = {
        "best_engine": spread([m["TRL"]["step"] / m["ours, vLLM"]["step"] for m in measured]),
        "same_engine": spread([m["TRL"]["step"] / m["ours, transformers"]["step"] for m in measured]),
        "seconds_per_step": {key: [round(m[key]["step"], 4) for m in measured] for key in sides},
        "tokens_per_completion": {key: statistics.mean(m[key]["length"] for m in measured) for key in sides},
        "our_phases": {key: phase_means(measured, key) for key in sides if key != "TRL"},
    }
    save(report, args, {"policy": SHAPE}, args.output)


if __name__ == "__main__":
    main()
