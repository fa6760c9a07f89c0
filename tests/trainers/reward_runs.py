"""Pairs in which good words win, and settings that keep a reward model's training quiet and short."""

import random

from datasets import Dataset

from align.trainers.reward import RewardConfig

GOOD = 6  # w0 .. w5 are good words


def pairs(count: int, seed: int = 0, **columns) -> Dataset:
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        a, b = sorted(([rng.randrange(30) for _ in range(rng.randint(3, 9))] for _ in range(2)), key=quality)
        if quality(a) < quality(b):
            prompt = text(rng.randrange(30) for _ in range(rng.randint(1, 4)))
            rows.append({"prompt": f"{prompt} ", "chosen": text(b), "rejected": text(a), **columns})
    return Dataset.from_list(rows)


def quality(words):
    return sum(w < GOOD for w in words)


def text(words):
    return " ".join(f"w{w}" for w in words)


def config(folder, **options) -> RewardConfig:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "num_train_epochs": 4,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RewardConfig(**{**defaults, **options})


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
