"""Pairs per second of DPOTrainer against TRL's, on the same pairs, model and optimiser, with the same losses.

    OMP_NUM_THREADS=2 python benchmarks/dpo_vs_trl.py [--data FILE] [--pairs 8] [--steps 6] [--repetitions 3]
    OMP_NUM_THREADS=2 python benchmarks/dpo_vs_trl.py --steps 4 --reference live
    OMP_NUM_THREADS=2 python benchmarks/dpo_vs_trl.py --steps 4 --reference cached \
        --output benchmarks/results/dpo_vs_trl_cached.json
    OMP_NUM_THREADS=2 python benchmarks/dpo_vs_trl.py --pairs 32 --steps 2 --trl_micro 1 2 --ours_micro 8 \
        --reference live --output benchmarks/results/dpo_vs_trl_32.json

Both train the same randomly drawn Llama in float32 on real preference pairs (`--data`), `--pairs` of them per optimiser
step, in the same order, none of them cut; the optimiser is transformers' default, the fused AdamW. First TRL's trainer
is timed once per setting: the whole step as one batch, or in micro-batches with gradient accumulation, its pairs sorted
by length for that (`--trl_micro`: of these sizes only). Then its fastest setting, the whole step (unless left out by
`--trl_micro`), and ours (`--ours_micro` pairs per micro-batch, or the whole step) take turns on further pairs. All that
with a live reference, and again with log-probs precomputed on both sides (their computation is not counted).

A step's time is that between the ends of two steps, loader, collation, optimiser and logging included; the first step
of a run is left out. The losses of both sides must agree step by step to 1e-4 (relative).
"""

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

HERE = Path(__file__).parent
DATA = Path(os.environ.get("ALIGN_SHARED_DATA", HERE.parents[1] / "shared" / "data")) / "hh_harmless_pairs.parquet"
RESULT = HERE / "results" / "dpo_vs_trl.json"


class StepTimes(TrainerCallback):
    """Wall and processor seconds of every step but the first."""

    def __init__(self):
        self.wall, self.cpu, self.last = [], [], None

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        if self.last is not None:
            self.wall.append(now[0] - self.last[0])
            self.cpu.append(now[1] - self.last[1])
        self.last = now


# ---- model and pairs -------------------------------------------------------------------------------------------------


def text_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


def drawn_model(folder: Path, args: argparse.Namespace):
    """A randomly drawn Llama for the texts of `args.data`, and its tokenizer, which is returned."""
    columns = Dataset.from_parquet(str(args.data), keep_in_memory=True)
    texts = [row[name] for row in columns for name in ("prompt", "chosen", "rejected")]
    tokenizer = text_tokenizer(texts, args.vocabulary)
    make_model(folder, tokenizer, args.hidden, args.layers)
    return tokenizer


def make_model(folder: Path, tokenizer, hidden: int, layers: int) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=int(hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
        max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def usable_pairs(path: Path, tokenizer, max_length: int) -> Dataset:
    """Shuffled pairs of text with their token ids, those alone that no trainer has to cut."""
    from align.data import load_rows, tokenize_pairs

    pairs = tokenize_pairs(load_rows(path), tokenizer, max_length=None, max_bad_share=0.01)
    pairs = pairs.filter(lambda row: length(row) <= max_length, keep_in_memory=True, load_from_cache_file=False)
    return pairs.shuffle(seed=0, keep_in_memory=True)


def length(row: dict) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def sorted_within_steps(pairs: Dataset, size: int) -> Dataset:
    """The same pairs in the same steps, inside a step by length."""
    lengths = [length(row) for row in pairs]
    order = [
        i
        for start in range(0, len(pairs), size)
        for i in sorted(range(start, min(start + size, len(pairs))), key=lambda i: lengths[i])
    ]
    return pairs.select(order, keep_in_memory=True)


# ---- one run ---------------------------------------------------------------------------------------------------------


def options(folder: Path, args: argparse.Namespace, micro: int, steps: int, cached: bool) -> dict:
    """What both configurations are made of."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": args.pairs // micro, "max_steps": steps, "learning_rate": 1e-4,
        "lr_scheduler_type": "constant", "max_length": None, "precompute_ref_log_probs": cached, "beta": 0.1,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, **args.device_options,
    }  # fmt: skip


def of_trl(model: str, pairs: Dataset, settings: dict):
    import trl

    trainer = trl.DPOTrainer(
        LlamaForCausalLM.from_pretrained(model, attn_implementation="sdpa"),
        args=trl.DPOConfig(**settings),
        train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model),
    )
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        if trainer.train_dataset[name] != pairs[name]:
            raise SystemExit(f"TRL's {name} differ from ours: nothing could be compared")
    return trainer


def of_ours(model: str, pairs: Dataset, settings: dict):
    from align import DPOConfig, DPOTrainer

    return DPOTrainer(model, DPOConfig(**settings), pairs)


def run(make, model: str, pairs: Dataset, settings: dict) -> dict:
    """Losses of all steps, and seconds of all but the first."""
    trainer, times = make(model, pairs, settings), StepTimes()
    trainer.add_callback(times)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"losses": losses, "wall": times.wall, "cpu": times.cpu, "peak": peak}


# ---- the comparison --------------------------------------------------------------------------------------------------


def compare(model: str, pairs: Dataset, args: argparse.Namespace, cached: bool, folder: Path):
    """Yields the result so far, after every repetition."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if args.pairs % size == 0 and size < args.pairs]
    trials = {f"{size} per micro-batch{', sorted' * (size > 1)}": (of_trl, size, size > 1) for size in sizes}
    trials["whole step"] = (of_trl, args.pairs, False)
    if args.trl_micro:
        trials = {name: side for name, side in trials.items() if side[1] in args.trl_micro}

    def one(side, number: int, steps: int) -> dict:
        make, micro, by_length = side
        first = number * args.pairs * args.steps
        rows = pairs.select(range(first, first + args.pairs * steps), keep_in_memory=True)
        rows = sorted_within_steps(rows, args.pairs) if by_length else rows
        return run(make, model, rows, options(folder, args, micro, steps, cached))

    clock = "wall" if torch.cuda.is_available() else "cpu"
    seconds, too_large = {}, []
    for name, side in trials.items():
        try:
            seconds[name] = sum(one(side, 0, args.trial_steps)[clock])
        except torch.cuda.OutOfMemoryError:
            too_large.append(name)
            gc.collect()
            torch.cuda.empty_cache()
    if not seconds:
        raise SystemExit(f"TRL's trainer ran out of memory in every setting: {', '.join(too_large)}")
    best = min(seconds, key=seconds.get)
    sides = {"trl plain": trials["whole step"]} if args.plain and "whole step" in trials else {}
    sides |= {"ours": (of_ours, args.ours_micro or args.pairs, False), "trl best": trials[best]}
    tried = {"clock": clock, "steps": args.trial_steps - 1, "seconds": {n: round(s, 2) for n, s in seconds.items()}}
    if too_large:
        tried["out_of_memory"] = too_large
    found = {name: [] for name in sides}
    for number in range(1, args.repetitions + 1):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            found[name].append(one(sides[name], number, args.steps))
        yield {"trl_settings_tried": tried, "trl_best_setting": best, **summary(found, args)}


def summary(found: dict[str, list[dict]], args: argparse.Namespace) -> dict:
    """Of the repetitions so far; SystemExit if the losses are not the same."""
    difference = max(
        abs(a - b) / abs(b)
        for other in found.keys() - {"ours"}
        for ours, theirs in zip(found["ours"], found[other], strict=True)
        for a, b in zip(ours["losses"], theirs["losses"], strict=True)
    )
    if difference > args.tolerance:
        raise SystemExit(f"the losses differ by up to {difference:.2g}: nothing was compared")
    result = {
        "repetitions": len(found["ours"]),
        "steps_compared": sum(len(r["losses"]) for r in found["ours"]),
        "largest_relative_difference_of_losses": difference,
    }
    if torch.cuda.is_available():
        result["peak_gib"] = {name: round(max(r["peak"] for r in runs) / 2**30, 3) for name, runs in found.items()}
    for clock in ("wall", "cpu"):
        per_second = {
            name: args.pairs * sum(len(r[clock]) for r in runs) / sum(sum(r[clock]) for r in runs)
            for name, runs in found.items()
        }
        result[f"pairs_per_second_{clock}"] = {name: round(value, 3) for name, value in per_second.items()}
        for other in [name for name in ("trl best", "trl plain") if name in found]:
            ratios = [
                sum(theirs[clock]) / sum(ours[clock]) for ours, theirs in zip(found["ours"], found[other], strict=True)
            ]
            result[f"times_faster_than_{other.replace(' ', '_')}_{clock}"] = {
                "median": round(statistics.median(ratios), 3), "each": [round(r, 3) for r in ratios],
            }  # fmt: skip
    return result


def machine() -> dict:
    if torch.cuda.is_available():
        return {"gpu": torch.cuda.get_device_name()}
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pairs per second of DPOTrainer against TRL's")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--pairs", type=int, default=8, help="per optimiser step")
    parser.add_argument("--steps", type=int, default=6, help="per run, the first one not counted")
    parser.add_argument("--trial_steps", type=int, default=2, help="per trial of a setting of TRL's, first not counted")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--trl_micro", type=int, nargs="+", help="try TRL's trainer with these micro-batches only")
    parser.add_argument("--ours_micro", type=int, help="pairs per micro-batch of ours; default: the whole step")
    parser.add_argument("--max_length", type=int, default=1024, help="pairs with longer sequences are left out")
    parser.add_argument("--reference", choices=["live", "cached"], nargs="+", default=["live", "cached"])
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.set_defaults(
        device_options={"use_cpu": True, "bf16": False, "gradient_checkpointing": False}, tolerance=1e-4, plain=True
    )
    return with_drawn_model(parser)


def with_drawn_model(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the options of `drawn_model` but the data."""
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32000, help="at most")
    return parser


def main(args: argparse.Namespace) -> None:
    if not args.data.exists():
        raise SystemExit(f"{args.data} is missing: give a file of preference pairs with --data")
    os.environ.setdefault("TQDM_DISABLE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = drawn_model(folder / "model", args)
        pairs = usable_pairs(args.data, tokenizer, args.max_length)
        result = {
            "machine": machine(),
            "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
            "setting": {name: value for name, value in vars(args).items() if name not in ("data", "output")},
            "data": {"file": args.data.name, "usable_pairs": len(pairs)},
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for reference in args.reference:
            for found in compare(str(folder / "model"), pairs, args, reference == "cached", folder / "run"):
                result[reference] = found
                args.output.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps({reference: result[reference]}, indent=1))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main(arguments().parse_args())
