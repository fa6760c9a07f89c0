"""A step of RLOO against TRL's RLOOTrainer: same model, prompts, completion lengths, reward and optimiser.

    python benchmarks/rloo_vs_trl.py [--workload fixed data] [--blocks 5] [--steps 4] [--output FILE]
    python benchmarks/rloo_vs_trl.py --workload fixed --shares --output benchmarks/results/rloo_shares.json

Two workloads (`worlds.on_policy.workload`): `fixed`, prompts of 32 tokens and completions of 96, in which nobody can
gain from completions that end early; and `data`, the lengths of real prompts and answers (`--pairs`). Two comparisons
in each, in one run, in alternating blocks of steps:

    best engine    TRL with transformers' generation, its vLLM path needs CUDA; ours with the faster of its two engines
    same engine    both with transformers' generation

Both sides take the same prompts and samples per step, in float32 and without gradient checkpointing; TRL in one micro-
batch and (`TRL, 4 parts`) in four, generated in one call (its continuous batching is slower on processors, 36 seconds a
step of `data` against 23, and its static cache no faster). A ratio is TRL's median step time of a block, of the faster
of these two, over ours of the same round: by the clock, and of the processors (on a machine with other work and with
OMP_NUM_THREADS=1, the one to trust). `padding` is the largest share in any of our steps.

`--shares` times nothing, but says of each side with transformers' generation what its time goes to: torch.profiler's
own time of matrix products, of attention and of everything else, over all steps.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow both sides down

import torch
from torch.profiler import ProfilerActivity, profile
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

PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm")
RESULT = Path(__file__).parent / "results" / "rloo_vs_trl.json"


def shared_options(folder: str, world, args) -> dict:
    return {
        "output_dir": folder,
        "max_steps": args.steps + 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "num_generations": args.generations,
        "max_completion_length": world.max_completion_length,
        "beta": 0.05,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
        **args.device_options,
    }


def ours(backend: str, world, args, folder: str, **engine):
    """engine: options of the section `rollout`."""
    from align.trainers.rloo import RLOOConfig, RLOOTrainer

    tokenizer, data, model = make(world, args)
    config = RLOOConfig(
        **shared_options(folder, world, args),
        per_device_train_batch_size=args.prompts,
        max_prompt_length=world.max_prompt_length,
        rollout={"backend": backend, **engine},
    )
    return RLOOTrainer(model, even_words, config, data, processing_class=tokenizer)


def theirs(parts: int, world, args, folder: str, **options):
    """options: of TRL's configuration; without any it generates with transformers."""
    from trl import RLOOConfig, RLOOTrainer

    tokenizer, data, model = make(world, args)
    config = RLOOConfig(
        **shared_options(folder, world, args),
        per_device_train_batch_size=args.prompts * args.generations // parts,
        gradient_accumulation_steps=parts,
        **{"use_vllm": False, **options},
    )
    source = Path(folder) / "model"  # TRL loads the reference from where the policy came from
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)  # its vLLM reads one
    return RLOOTrainer(str(source), even_words, config, data, processing_class=tokenizer)


def make(world, args):
    tokenizer = make_tokenizer(args.vocabulary)
    data = make_prompts(256, world.prompt_lengths, args.vocabulary)
    with torch.device("cpu" if args.device_options["use_cpu"] else "cuda"):  # a GPU draws a large one in a moment
        model = make_model(tokenizer, world.end, **args.shape)
    return tokenizer, data, model


SIDES = {
    "ours, vLLM": lambda *given: ours("vllm", *given),
    "ours, transformers": lambda *given: ours("transformers", *given),
    "TRL": lambda *given: theirs(1, *given),
    "TRL, 4 parts": lambda *given: theirs(4, *given),
}


def block(key: str, world, args, folder: str) -> dict:
    """One trainer's steps: seconds per step, tokens per completion, and where our time goes."""
    trainer, clock = SIDES[key](world, args, folder), StepClock()
    trainer.add_callback(clock)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][1:]
    phases = {name for entry in logs for name in entry if name.startswith("time/")}
    if hasattr(trainer, "close"):
        trainer.close()
    return {
        "clock": sorted(clock.seconds)[len(clock.seconds) // 2],
        "processor": sorted(clock.processor_seconds)[len(clock.seconds) // 2],
        "length": sum(entry["completions/mean_length"] for entry in logs) / len(logs),
        "padding": max(entry.get("padding", 0.0) for entry in logs),
        "phases": {name: sum(entry.get(name, 0.0) for entry in logs) / len(logs) for name in sorted(phases)},
    }


def shares(key: str, world, args, folder: str) -> dict:
    """Of the time in PyTorch's operations."""
    trainer = SIDES[key](world, args, folder)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.train()
    seconds = {"products": 0.0, "attention": 0.0, "other": 0.0}
    for event in profiler.key_averages():
        attention, product = "scaled_dot_product" in event.key, event.key.removeprefix("aten::") in PRODUCTS
        seconds["attention" if attention else "products" if product else "other"] += event.self_cpu_time_total
    return {name: round(value / sum(seconds.values()), 3) for name, value in seconds.items()}


def measure(world, args, folder: str) -> dict:
    """Rounds of blocks in turn, each round in another order."""
    rounds, sides = [], args.sides
    for number in range(args.blocks):
        first = number % len(sides)
        rounds.append({key: block(key, world, args, folder) for key in sides[first:] + sides[:first]})
        print({key: round(value["processor"], 3) for key, value in rounds[-1].items()}, flush=True)
    medians = {key: statistics.median(r[key]["processor"] for r in rounds) for key in sides}
    our_best = min((key for key in sides if key.startswith("ours")), key=medians.get)
    their_best = min((key for key in sides if key.startswith("TRL")), key=medians.get)
    compared = {"best_engine": our_best, "same_engine": "ours, transformers"}
    return {
        **{
            f"{name}_{clock}": spread([r[their_best][clock] / r[key][clock] for r in rounds])
            for name, key in compared.items()
            for clock in ("processor", "clock")
        },
        "sides_of_best_engine": [their_best, our_best],
        "seconds_per_step": {key: [round(r[key]["clock"], 4) for r in rounds] for key in sides},
        "processor_seconds_per_step": {key: [round(r[key]["processor"], 4) for r in rounds] for key in sides},
        "tokens_per_completion": {key: statistics.mean(r[key]["length"] for r in rounds) for key in sides},
        "padding": max(r[our_best]["padding"] for r in rounds),
        "our_phases": {key: phase_means(rounds, key) for key in sides if key.startswith("ours")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=("fixed", "data"), default=["fixed", "data"])
    parser.add_argument("--pairs", type=Path, default=DATA, help="pairs whose lengths `data` has")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="measured steps per block")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument(
        "--shares", action="store_true", help="what the time of each side goes to, instead of the times"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.set_defaults(device_options={"use_cpu": True, "bf16": False, "gradient_checkpointing": False})
    args = parser.parse_args()
    args.shape = sizes(args)

    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.workload:
            world = workload(name, args.pairs)
            if args.shares:
                report[name] = {key: shares(key, world, args, folder) for key in ("ours, transformers", "TRL, 4 parts")}
            else:
                report[name] = measure(world, args, folder)
    save(report, args, {"policy": {**SHAPE, **sizes(args)}}, args.output)


if __name__ == "__main__":
    main()
