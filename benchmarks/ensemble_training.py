"""What training five reward models from one pass over the data costs, next to training one.

    python benchmarks/ensemble_training.py [--repetitions 7] [--steps 3] [--output FILE]

For each way to share a model, `JointRewardTrainer` with five members against the same trainer with one, and against
`RewardTrainer` of the whole model; same pairs, batches and number of steps. A ratio is one repetition's time over the
other's, in processor time and by the wall clock, from the first step to the last (loading, tokenising and the
normaliser are left out); the variants take turns within a repetition, in an order that rotates.

What to expect, for L layers of which u are the members' own, in units of a layer's forward pass (a backward pass costs
two, and one through frozen weights one): a frozen trunk L - u + 3 u K, a trained one 3 (L - u) + 3 u K, LoRA on all
layers 2 L K.
"""

import argparse
import gc
import json
import logging
import platform
import random
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tqdm import trange
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

from align.modeling.member_lora import add_member_adapters
from align.modeling.members import share_trunk
from align.trainers.reward import RewardConfig, RewardTrainer
from align.trainers.sweeps.joint_ensemble import JointRewardTrainer

RESULT = Path(__file__).parent / "results" / "ensemble_training.json"
SHAPE = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
PAIRS_PER_STEP = 8
UPPER = 2
MEMBERS = 5
TARGETS = ["q_proj", "v_proj"]
KINDS = {
    "shared trunk, frozen": lambda model, seeds: share_trunk(model, seeds, UPPER),
    "shared trunk, trained": lambda model, seeds: share_trunk(model, seeds, UPPER, train_trunk=True),
    "LoRA": lambda model, seeds: add_member_adapters(model, LoraConfig(r=8, target_modules=TARGETS), seeds),
    "LoRA, upper 4 layers": lambda model, seeds: add_member_adapters(
        model, LoraConfig(r=8, target_modules=TARGETS, layers_to_transform=[8, 9, 10, 11]), seeds
    ),
}


def plain_model():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE, pad_token_id=0, eos_token_id=1, num_labels=1))


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def pairs(count: int, seed: int) -> Dataset:
    rng = random.Random(seed)

    def ids(length):
        return [rng.randrange(3, SHAPE["vocab_size"]) for _ in range(length)]

    rows = [{"prompt_ids": ids(16), "chosen_ids": [*ids(47), 1], "rejected_ids": [*ids(47), 1]} for _ in range(count)]
    return Dataset.from_list(rows)


class Clock(TrainerCallback):
    """Seconds from the first step to the last."""

    def on_train_begin(self, *args, **kwargs):
        gc.collect()
        self.start = time.perf_counter(), time.process_time()

    def on_train_end(self, *args, **kwargs):
        self.seconds = {"wall": time.perf_counter() - self.start[0], "cpu": time.process_time() - self.start[1]}


def train(kind: str | None, members: int, data: Dataset, steps: int, folder: str) -> dict[str, float]:
    clock = Clock()
    args = RewardConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=PAIRS_PER_STEP,
        learning_rate=1e-4,
        normalizer_pairs=2,
        save_strategy="no",
        logging_steps=1000,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    options = {"processing_class": tokenizer(), "callbacks": [clock]}
    if kind is None:
        trainer = RewardTrainer(plain_model(), args, data, **options)
    else:
        trainer = JointRewardTrainer(KINDS[kind](plain_model(), list(range(members))), args, data, **options)
    trainer.log = lambda *_, **__: None
    trainer.train()
    return clock.seconds


def spread(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4)
    numbers = {"median": statistics.median(values), "q1": quarters[0], "q3": quarters[2], "min": min(values)}
    return {name: round(value, 4) for name, value in {**numbers, "max": max(values)}.items()}


def report(measured: list[dict], steps: int) -> dict:
    found: dict = {}
    for kind in KINDS:
        for clock in ("cpu", "wall"):
            five = [m[f"{kind}: {MEMBERS}"][clock] for m in measured]
            for rival, name in ((f"{kind}: 1", "one"), ("whole model", "one_whole_model")):
                ratios = [a / m[rival][clock] for a, m in zip(five, measured, strict=True)]
                found.setdefault(kind, {})[f"ratio_{clock}_to_{name}"] = spread(ratios)
    found["cpu_seconds"] = {name: [round(m[name]["cpu"], 4) for m in measured] for name in measured[0]}
    found["workload"] = {
        "members": MEMBERS,
        "upper_layers": UPPER,
        "lora": {"r": 8, "target_modules": TARGETS},
        "model": {**SHAPE, "dtype": "float32"},
        "step": f"{PAIRS_PER_STEP} pairs of 2 x 64 tokens, {steps} steps",
    }
    found["versions"] = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
    return {**found, "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT, help="written after every repetition from the second on")
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    variants = {"whole model": (None, 1)}
    variants |= {f"{kind}: {count}": (kind, count) for kind in KINDS for count in (1, MEMBERS)}
    names, measured = list(variants), []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in trange(-1, args.repetitions, desc="Measuring"):
            data = pairs(PAIRS_PER_STEP * args.steps, number)
            shift = number % len(names)
            order = names[shift:] + names[:shift]
            seconds = {name: train(*variants[name], data, args.steps, folder) for name in order}
            measured += [seconds] if number >= 0 else []  # the first one warms up
            if len(measured) > 1:
                args.output.write_text(json.dumps(report(measured, args.steps), indent=1) + "\n")
    for kind in KINDS:
        for name, values in report(measured, args.steps)[kind].items():
            print(f"{kind:24s} {name:28s} {values}")


if __name__ == "__main__":
    main()
