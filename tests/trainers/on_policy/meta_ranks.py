"""MetaAPO with one global batch of 8, on one process or two. Run as a script: policy, folder."""

import json
import re
import sys
from pathlib import Path

import torch.distributed as dist

from align.data import toy
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import logged, on_policy, tiny_model, wanted_words

NEW = re.compile(r"(meta|offline|online)/")
KEYS = ("loss", "grad_norm", "meta/loss", "meta/weight", "meta/drawn", "offline/loss", "reward", "rewards/margins")


def train(policy: str, folder: Path, world: int) -> dict:
    """The large epsilon keeps AdamW from making whole steps of rounding errors; the ends of h's weights would be."""
    trainer_class, args = on_policy(
        "metaapo", folder, num_generations=3, num_mini_batches=2, max_steps=8, meta_every=3, seed=1, beta=0.5,
        per_device_train_batch_size=8 // world, learning_rate=5e-3, adam_epsilon=0.1,
    )  # fmt: skip
    reference = tiny_model(toy.tokenizer(), seed=5)
    trainer = trainer_class(policy, wanted_words, args, toy_pairs(64), ref_model=reference)
    trainer.train()
    return {
        **{key: logged(trainer, key) for key in KEYS},
        "logged": sorted({key for log in trainer.state.log_history for key in log if NEW.match(key)}),
        "h": [p.flatten()[0].item() for p in trainer.meta.parameters.values()],
        "pairs": len(trainer.meta.pairs),
    }


if __name__ == "__main__":
    found = train(sys.argv[1], Path(sys.argv[2]), 2)
    Path(sys.argv[2]).with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
