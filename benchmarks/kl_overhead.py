"""Time of a step of the losses that need the KL over the whole vocabulary (TDPO, SparsePO, MaPO), against DPO's.

    OMP_NUM_THREADS=2 python benchmarks/kl_overhead.py [--data FILE] [--pairs 8] [--batches 4] [--repetitions 5]

The trainers of all losses hold copies of one randomly drawn Llama in float32, and compute the same batches of real
preference pairs in turns: reference, policy, loss and backward pass, as in training; not the optimiser, which would
only dilute the difference. A ratio is one repetition's time of a loss over that of DPO, by the wall clock and in
processor time (which other work on the machine disturbs less).
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from dpo_vs_trl import DATA, make_model, text_tokenizer, usable_pairs

RESULT = Path(__file__).parent / "results" / "kl_overhead.json"
TARGET = 1.6


def trainers(model: str, pairs: Dataset, folder: Path) -> dict:
    from align import DPOConfig, DPOTrainer, SparsePOConfig, SparsePOTrainer

    options = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "max_length": None,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    made = {
        name: DPOTrainer(model, DPOConfig(loss_type=name, **options), pairs) for name in ("sigmoid", "tdpo1", "tdpo2")
    }
    for variant in ("common", "independent", "mapo"):
        made[f"sparsepo {variant}"] = SparsePOTrainer(model, SparsePOConfig(variant=variant, **options), pairs)
    for trainer in made.values():
        trainer.check_start = False  # only part of the first step
        trainer.model.train()
    return made


def step(trainer, batch: dict) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    loss = trainer.pair_losses(trainer.model, batch).losses.mean()
    loss.backward()
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    trainer.model.zero_grad()
    return taken


def measure(made: dict, pairs: Dataset, args) -> dict[str, list[dict[str, float]]]:
    """Seconds of all batches, by loss and repetition."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    for repetition in range(args.repetitions + 1):
        totals = {name: {"wall": 0.0, "cpu": 0.0} for name in made}
        for number in range(args.batches):
            rows = [pairs[i] for i in range(number * args.pairs, (number + 1) * args.pairs)]
            for name in list(made) if (repetition + number) % 2 else list(made)[::-1]:
                batch = made[name].planner.collate(rows)
                batch["mean_chosen_length"] = torch.tensor(100.0)
                for clock, seconds in step(made[name], batch).items():
                    totals[name][clock] += seconds
        if repetition:  # the first one warms up
            for name, seconds in totals.items():
                found[name].append(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--pairs", type=int, default=8, help="per batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--max_length", type=int, default=1024, help="pairs with longer sequences are left out")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if not args.data.exists():
        raise SystemExit(f"{args.data} is missing: give a file of preference pairs with --data")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        columns = Dataset.from_parquet(str(args.data), keep_in_memory=True)
        texts = [text for name in ("prompt", "chosen", "rejected") for text in columns[name]]
        tokenizer = text_tokenizer(texts, args.vocabulary)
        make_model(folder / "model", tokenizer, args.hidden, args.layers)
        pairs = usable_pairs(args.data, tokenizer, args.max_length).select(range(args.pairs * args.batches))
        made = trainers(str(folder / "model"), pairs, folder / "run")
        found = measure(made, pairs, args)
    report = {
        "measured": {
            "pairs": args.pairs, "batches": args.batches, "hidden": args.hidden, "layers": args.layers,
            "vocabulary": len(tokenizer), "dtype": "float32", "data": args.data.name,
        },
        "target": TARGET,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    for clock in ("wall", "cpu"):
        report[f"times_dpo_{clock}"] = {}
        for name, runs in found.items():
            ratios = [run[clock] / dpo[clock] for run, dpo in zip(runs, found["sigmoid"], strict=True)]
            report[f"times_dpo_{clock}"][name] = {
                "median": round(statistics.median(ratios), 3), "each": [round(r, 3) for r in ratios],
            }  # fmt: skip
    report["seconds_per_batch_of_dpo_cpu"] = statistics.median(r["cpu"] for r in found["sigmoid"]) / args.batches
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    for name in found:
        wall, cpu = (report[f"times_dpo_{clock}"][name]["median"] for clock in ("wall", "cpu"))
        print(f"{name:22s} x{wall} wall, x{cpu} cpu")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
