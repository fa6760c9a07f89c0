"""Time of a training step of TDPO1, SparsePO and MaPO, as multiples of DPO's with a live reference.

    OMP_NUM_THREADS=1 python benchmarks/sparsepo_overhead.py [--data FILE] [--pairs 8] [--steps 4] [--repetitions 3]

All train the same randomly drawn Llama in float32 on the same real preference pairs, in turns in one process; model,
pairs and clock are those of `dpo_vs_trl.py`. A step's time is that between the ends of two steps, loader, collation and
optimiser included; the first step of a run is left out. Times are the processor's, which other work on the machine
disturbs less than the wall clock's.
"""

import argparse
import json
import os
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from dpo_vs_trl import DATA, StepTimes, make_model, text_tokenizer, usable_pairs

from align import DPOConfig, DPOTrainer, SparsePOConfig, SparsePOTrainer

RESULT = Path(__file__).parent / "results" / "sparsepo_overhead.json"
METHODS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "tdpo1": (DPOTrainer, DPOConfig, {"loss_type": ["tdpo1"]}),
    "sparsepo common": (SparsePOTrainer, SparsePOConfig, {"variant": "common"}),
    "sparsepo independent": (SparsePOTrainer, SparsePOConfig, {"variant": "independent"}),
    "mapo all": (SparsePOTrainer, SparsePOConfig, {"variant": "mapo"}),
}


def seconds(name: str, model: str, pairs: Dataset, settings: dict) -> float:
    """Processor seconds of all steps but the first."""
    trainer_class, config, own = METHODS[name]
    only_masks = {"num_logged_pairs": 0} if trainer_class is SparsePOTrainer else {}
    trainer, times = trainer_class(model, config(**settings, **own, **only_masks), pairs), StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return sum(times.cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--pairs", type=int, default=8, help="per optimiser step")
    parser.add_argument("--steps", type=int, default=4, help="per run, the first one not counted")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--max_length", type=int, default=512, help="pairs with longer sequences are left out")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if not args.data.exists():
        raise SystemExit(f"{args.data} is missing: give a file of preference pairs with --data")
    os.environ.setdefault("TQDM_DISABLE", "1")
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        columns = Dataset.from_parquet(str(args.data), keep_in_memory=True)
        texts = [text for column in ("prompt", "chosen", "rejected") for text in columns[column]]
        tokenizer = text_tokenizer(texts, args.vocabulary)
        make_model(folder / "model", tokenizer, args.hidden, args.layers)
        pairs = usable_pairs(args.data, tokenizer, args.max_length)
        needed = args.pairs * args.steps
        for number in range(args.repetitions):
            rows = pairs.select(range(number * needed, (number + 1) * needed), keep_in_memory=True)
            settings = {
                "output_dir": str(folder / "run"), "per_device_train_batch_size": args.pairs, "max_steps": args.steps,
                "learning_rate": 1e-4, "lr_scheduler_type": "constant", "max_length": None, "beta": 0.1, "bf16": False,
                "train_sampling_strategy": "sequential", "report_to": "none", "save_strategy": "no", "use_cpu": True,
                "disable_tqdm": True, "gradient_checkpointing": False, "optim": "adamw_torch",
            }  # fmt: skip
            for name in list(METHODS) if number % 2 else list(METHODS)[::-1]:
                found[name].append(seconds(name, str(folder / "model"), rows, settings))
    ratios = {name: [a / b for a, b in zip(found[name], found["dpo"], strict=True)] for name in METHODS}
    result = {
        "setting": {k: v for k, v in vars(args).items() if k not in ("data", "output")}
        | {"dtype": "float32", "threads": torch.get_num_threads()},
        "data": {"file": args.data.name, "usable_pairs": len(pairs)},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "cpu_seconds_per_step": {n: round(sum(v) / len(v) / (args.steps - 1), 4) for n, v in found.items()},
        "times_dpo": {
            name: {"median": round(statistics.median(each), 3), "each": [round(r, 3) for r in each]}
            for name, each in ratios.items()
        },
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
