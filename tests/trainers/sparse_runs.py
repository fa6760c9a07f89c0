"""Settings for short SparsePO and MaPO runs."""

from align.data import toy
from align.trainers.sparsepo import SparsePOConfig, SparsePOTrainer
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import QUIET


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
        toy_pairs(16),
        eval_data,
        processing_class=toy.tokenizer(),
        ref_model=reference,
        peft_config=lora,
    )
