"""Where the time of a DPO step goes, and what bounds the distance to TRL's: the arithmetic of both sides, counted.

    OMP_NUM_THREADS=2 python benchmarks/pair_roofline.py MODEL [--pairs 8] [--steps 4] [--full] [--data FILE]
    OMP_NUM_THREADS=2 python benchmarks/pair_roofline.py --full --output benchmarks/results/pair_roofline_full.json

MODEL is a folder in transformers' form, left out the randomly drawn Llama of dpo_vs_trl.py; both sides train a LoRA
adapter on it (`--full`: all weights) in float32, on the same pairs, with the same losses, a live reference, and no
gradient checkpointing. TRL's trainer takes the pairs of a step one by one, its fastest setting on a processor
(dpo_vs_trl.py): nothing is padded there, so no arithmetic is wasted on padding. Per side, over the steps but the first:

- `gflop_per_pair`: the operations of all matrix products, attention's included, as PyTorch's counter sees them
  (attention as plain products, so that it can). Exact, and the same whatever else the machine does.
- `matrix_share`: the share of the operators' time that these products and attention take (PyTorch's profiler).
- `gflop_per_second`, and `of_peak`: what that is of the rate of one large product, measured beside it.

`bound` is how many times faster ours would be if both sides reached the same rate: the ratio of the arithmetic.
"""

import argparse
import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

try:
    from benchmarks.dpo_vs_trl import DATA, StepTimes, drawn_model, machine, options, usable_pairs, with_drawn_model
except ImportError:  # run as a script
    from dpo_vs_trl import DATA, StepTimes, drawn_model, machine, options, usable_pairs, with_drawn_model

RESULT = Path(__file__).parent / "results" / "pair_roofline.json"
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)


def adapter(args: argparse.Namespace) -> LoraConfig | None:
    return None if args.full else LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def of_trl(args: argparse.Namespace, pairs, settings: dict):
    import trl

    return trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa"),
        args=trl.DPOConfig(**settings), train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=AutoTokenizer.from_pretrained(args.model), peft_config=adapter(args),
    )  # fmt: skip


def of_ours(args: argparse.Namespace, pairs, settings: dict):
    from align import DPOConfig, DPOTrainer

    return DPOTrainer(args.model, DPOConfig(**settings), pairs, peft_config=adapter(args))


class Profiled(TrainerCallback):
    """The operators of every step but the first."""

    def __init__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.profile.start()
        if state.global_step == state.max_steps:
            self.profile.stop()

    def matrix_share(self) -> float:
        operators = [event for event in self.profile.key_averages() if event.key.startswith("aten::")]
        of_products = sum(event.self_cpu_time_total for event in operators if event.key.startswith(PRODUCTS))
        return of_products / sum(event.self_cpu_time_total for event in operators)


def trained(make, args: argparse.Namespace, pairs, micro: int, steps: int, *callbacks) -> tuple[list, StepTimes]:
    """Losses, and seconds, of so many steps."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(args, pairs, options(Path(folder), args, micro, steps, cached=False))
        for callback in (times, *callbacks):
            trainer.add_callback(callback)
        torch.manual_seed(0)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], times


def counted(make, args: argparse.Namespace, pairs, micro: int) -> float:
    """Operations of one step: of two steps, less those of one (what a start checks is in both)."""
    totals = []
    for steps in (1, 2):
        rows = pairs.select(range(args.pairs * steps), keep_in_memory=True)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            trained(make, args, rows, micro, steps)
        totals.append(counter.get_total_flops())
    return totals[1] - totals[0]


def timed(make, args: argparse.Namespace, pairs, micro: int) -> dict:
    rows = pairs.select(range(args.pairs * args.steps), keep_in_memory=True)
    losses, times = trained(make, args, rows, micro, args.steps)
    return {"losses": losses, "seconds": times.wall}


def matrix_share(make, args: argparse.Namespace, pairs, micro: int) -> float:
    profiled = Profiled()
    trained(make, args, pairs.select(range(args.pairs * 2), keep_in_memory=True), micro, 2, profiled)
    return profiled.matrix_share()


def peak() -> float:
    """Operations per second of a product of [1024, 2048] and [2048, 2048], the best of some."""
    left, right = torch.randn(1024, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * 1024 * 2048 * 2048 / min(seconds)


def measure(args: argparse.Namespace) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = usable_pairs(args.data, tokenizer, args.max_length)
    sides = {"ours": (of_ours, args.pairs), "trl": (of_trl, 1)}
    flops = {name: counted(make, args, pairs, micro) for name, (make, micro) in sides.items()}
    found: dict[str, list[dict]] = {name: [] for name in sides}
    rates = [peak()]
    for number in range(args.repetitions):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            found[name].append(timed(sides[name][0], args, pairs, sides[name][1]))
            rates.append(peak())
    difference = max(
        abs(a - b) / abs(b)
        for ours, theirs in zip(found["ours"], found["trl"], strict=True)
        for a, b in zip(ours["losses"], theirs["losses"], strict=True)
    )
    if difference > args.tolerance:
        raise SystemExit(f"the losses differ by up to {difference:.2g}: nothing was compared")
    result = {}
    for name, (make, micro) in sides.items():
        per_second = flops[name] / statistics.median(second for run in found[name] for second in run["seconds"])
        result[name] = {
            "gflop_per_pair": round(flops[name] / args.pairs / 1e9, 1),
            "matrix_share": round(matrix_share(make, args, pairs, micro), 3),
            "gflop_per_second": round(per_second / 1e9, 1),
            "of_peak": round(per_second / max(rates), 3),
        }
    ratios = [sum(b["seconds"]) / sum(a["seconds"]) for a, b in zip(found["ours"], found["trl"], strict=True)]
    return {
        **result,
        "peak_gflop_per_second": round(max(rates) / 1e9, 1),
        "bound": round(flops["trl"] / flops["ours"], 2),
        "times_faster": {"median": round(statistics.median(ratios), 2), "each": [round(ratio, 2) for ratio in ratios]},
        "largest_relative_difference_of_losses": difference,
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Where the time of a DPO step goes")
    parser.add_argument("model", nargs="?", help="a folder; default: the Llama of dpo_vs_trl.py")
    parser.add_argument("--full", action="store_true", help="train all weights, not an adapter")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--pairs", type=int, default=8, help="per optimiser step")
    parser.add_argument("--steps", type=int, default=4, help="per run, the first one not counted")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=1024, help="pairs with longer sequences are left out")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.set_defaults(
        device_options={"use_cpu": True, "bf16": False, "gradient_checkpointing": False}, tolerance=1e-4
    )
    return with_drawn_model(parser)


def main(args: argparse.Namespace) -> None:
    left_out = {"data", "output", "model"} | ({"hidden", "layers", "vocabulary"} if args.model else set())
    setting = {name: value for name, value in vars(args).items() if name not in left_out}
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    name = Path(args.model).name if args.model else "of dpo_vs_trl.py"
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            args.model = str(Path(folder) / "model")
            drawn_model(Path(args.model), args)
        result = {"machine": machine(), "versions": versions, "model": name, "setting": setting, **measure(args)}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(arguments().parse_args())
