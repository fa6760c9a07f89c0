"""What bfloat16 costs under FSDP2, beside what it costs in one process: margins, log-probs and gradients of DPO.

    python -m tests.real_model
    python -m benchmarks.fsdp2_precision --pairs FILE [--model .cache/real_model] [--batches 3] [--output FILE]

The policy is the model after a few steps of DPO in float32, the reference is the model. A step of DPO on 8 pairs is
computed in float32 and in several ways in bfloat16, on one process and sharded on two, with the policy's weights
rounded to bfloat16, so that only the computation differs. `weights`: float32 again, with the weights before they are
rounded, which is what every run in bfloat16 loses before it computes anything. Differences are from float32: root mean
squares over pairs (nats), the norm of the difference of the whole gradient over its norm, the median over tensors, and
the smallest cosine of a tensor's gradient; all are means over the batches. `float32` has the margins themselves, and
`fsdp2 from` the differences of FSDP2 from one process that holds its weights in bfloat16. FILE: parquet with columns
prompt, chosen, rejected.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import TrainerCallback

from align.distributed.shards import whole
from align.trainers.dpo import DPOConfig, DPOTrainer
from tests.trainers.accelerate_setups import under

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fsdp2_precision.json"
PAIRS, STEPS, LONGEST = 8, 8, 420  # of a batch; of DPO before; characters of a pair
HELD = "one process, weights in bfloat16"
KINDS: dict[str, dict] = {
    "weights": {"policy": "trained"},
    "one process, autocast": {"bf16": True},
    "one process, autocast, padded": {"bf16": True, "batching": "padded"},
    HELD: {"weights": torch.bfloat16},
    "fsdp2": {"bf16": True},
    "fsdp2, 4 micro-batches": {"bf16": True, "cut": 4},
}


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.parts = {name: whole(p.grad).float() for name, p in model.named_parameters()}


def step(folder: Path, rows: Dataset, *, policy="policy", cut=1, weights=None, **options) -> dict:
    """{pairs: by number, what was measured; gradient: by parameter} of one step. cut: micro-batches of a process.
    weights: the dtype of policy and reference."""
    kept, pairs = Gradient(), {}
    size = len(rows) // int(os.environ.get("WORLD_SIZE", "1")) // cut
    args = DPOConfig(
        output_dir=str(folder / "run"), per_device_train_batch_size=size, gradient_accumulation_steps=cut, max_steps=1,
        max_grad_norm=0.0, max_length=160, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, **{"bf16": False, **options},
    )  # fmt: skip
    trainer = DPOTrainer(str(folder / policy), args, rows, ref_model=str(folder / "reference"), callbacks=[kept])
    for model in (trainer.model, trainer.ref_model) if weights else ():
        for parameter in model.parameters():  # and no buffers: rotary frequencies are float32 in every run
            parameter.data = parameter.data.to(weights)
    computed = trainer.pair_losses

    def pair_losses(model, batch):
        found = computed(model, batch)
        values = found.values()
        for i, row in enumerate(batch["row"].tolist()):
            pairs[row] = [values[name][i].item() for name in ("rewards/margins", "logps/chosen", "logps/rejected")]
        return found

    trainer.pair_losses = pair_losses
    trainer.train()
    return {"pairs": pairs, "gradient": kept.parts}


def compared(exact: dict, found: dict) -> dict[str, float]:
    values = [torch.tensor([run["pairs"][row] for row in sorted(run["pairs"])]) for run in (exact, found)]
    margins, *logps = (values[1] - values[0]).unbind(1)
    parts = [(found["gradient"][name], part) for name, part in exact["gradient"].items()]
    squares = [((mine - part).square().sum().item(), part.square().sum().item()) for mine, part in parts]
    cosines = [torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in parts]
    return {
        "margins": margins.square().mean().sqrt().item(),
        "logps": torch.cat(logps).square().mean().sqrt().item(),
        "gradient": (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5,
        "gradient, median tensor": statistics.median((a / b) ** 0.5 for a, b in squares),
        "gradient, smallest cosine": min(cosines),
    }


def prepare(args: argparse.Namespace, folder: Path, rows: Dataset) -> None:
    """Reference, trained policy, and the policy of which bfloat16 holds every weight."""
    given = DPOConfig(
        output_dir=str(folder / "trained"), per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=3e-5,
        lr_scheduler_type="constant", max_length=160, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(str(args.model), given, rows)
    trainer.train()
    trainer.save_model()
    trainer.model.bfloat16().float().save_pretrained(folder / "policy")
    trainer.ref_model.save_pretrained(folder / "reference")
    for name in ("policy", "reference"):
        trainer.processing_class.save_pretrained(folder / name)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    rows = load_dataset("parquet", data_files=str(args.pairs), cache_dir=str(folder / "cache"))["train"]
    short = [r for r in rows if len(r["prompt"]) + max(len(r["chosen"]), len(r["rejected"])) < LONGEST]
    batches = [Dataset.from_list(short[PAIRS * i :][:PAIRS]) for i in range(STEPS, STEPS + args.batches)]
    prepare(args, folder, Dataset.from_list(short[: PAIRS * STEPS]))
    found: dict[str, list[dict[str, float]]] = {}
    squares: list[float] = []
    for batch in batches:
        batch.to_parquet(folder / "batch.parquet")
        exact = step(folder, batch)
        squares += [margin**2 for margin, *_ in exact["pairs"].values()]
        for name, options in KINDS.items():
            run = on_two(folder, name) if name.startswith("fsdp2") else step(folder, batch, **options)
            found.setdefault(name, []).append(compared(exact, run))
            if name == HELD:
                held = run
            elif name == "fsdp2":
                found.setdefault(f"fsdp2 from {HELD}", []).append(compared(held, run))
            print(name, found[name][-1], flush=True)
    means = {n: {key: statistics.mean(one[key] for one in all_) for key in all_[0]} for n, all_ in found.items()}
    return {"float32": {"margins": statistics.mean(squares) ** 0.5}, **means}


def on_two(folder: Path, kind: str) -> dict:
    """A step of two processes, each of which runs this file."""
    ranks = [
        {**os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29675"}
        for r in (0, 1)
    ]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.fsdp2_precision", "--rank-of", str(folder), "--kind", kind]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for environment in ranks]
    if any([process.wait() for process in running]):
        raise SystemExit(f"{kind}: a process failed")
    parts = [torch.load(folder / f"rank{r}.pt") for r in (0, 1)]
    return {"pairs": parts[0]["pairs"] | parts[1]["pairs"], "gradient": parts[0]["gradient"]}


def as_rank(folder: Path, kind: str) -> None:
    torch.distributed.init_process_group("gloo")
    rows = load_dataset(
        "parquet", data_files=str(folder / "batch.parquet"), cache_dir=str(folder / f"cache{os.environ['RANK']}")
    )
    with under("fsdp2"):
        found = step(folder, rows["train"], **KINDS[kind])
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "real_model")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rank_of is not None:
        as_rank(args.rank_of, args.kind)
    else:
        with tempfile.TemporaryDirectory() as folder:
            runs = measure(args, Path(folder))
        versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
        about = {"model": args.model.name, "pairs": args.pairs.name, "batches of 8 pairs": args.batches}
        args.output.write_text(json.dumps({**about, "versions": versions, "runs": runs}, indent=1) + "\n")
