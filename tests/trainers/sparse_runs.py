"""Toy pairs and settings for SparsePO and MaPO trainers."""

import random

from datasets import Dataset
from tiny_runs import QUIET

from align.data import toy
from trainers.sparsepo import SparsePOConfig, SparsePOTrainer


def pairs(count: int = 16, seed: int = 0) -> Dataset:
    """Two answers of the reference text, the better one chosen."""
    rng, rows = random.Random(seed), []
    for prompt in toy.split_prompts(seed, 384)[0] * 4:
        answers = {toy.reference_answer(prompt["topic"], rng) for _ in range(2)}
        better = sorted(answers, key=lambda answer, topic=prompt["topic"]: toy.gold_score(topic, answer))
        if len(better) == 2:
            rows.append({"prompt": prompt["prompt"], "chosen": better[1], "rejected": better[0]})
    return Dataset.from_list(rows[:count])


def config(folder, **options) -> SparsePOConfig:
    defaults = {
        **QUIET,
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_length": 32,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "beta": 0.5,
    }
    return SparsePOConfig(**{**defaults, **options})


def trainer(policy, folder, eval_data=None, lora=None, reference=None, **options) -> SparsePOTrainer:
    return SparsePOTrainer(
        policy,
        config(folder, **options),
        pairs(),
        eval_data,
        processing_class=toy.tokenizer(),
        ref_model=reference,
        peft_config=lora,
    )
