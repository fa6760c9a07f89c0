"""D2PO with one global batch of 8, on one process or two. Run as a script: policy, discriminator, folder."""

import json
import re
import sys
from pathlib import Path

import torch.distributed as dist

from tests.trainers.tiny_runs import logged, on_policy, prompts, wanted_words

NEW = re.compile(r"discriminator/|time/(discriminator|gold)$")
KEYS = ("loss", "discriminator/loss", "discriminator/gold_labels", "discriminator/accuracy")


def train(policy: str, discriminator: str, folder: Path, world: int) -> dict:
    trainer_class, args = on_policy(
        "d2po", folder, num_generations=2, beta=0.1, gold_labels=3, gold_label_every=1, num_mini_batches=2, max_steps=4,
        per_device_train_batch_size=8 // world, discriminator_learning_rate=1e-3, seed=1,
    )  # fmt: skip
    reward = {"type": "classifier", "path": discriminator}
    trainer = trainer_class(policy, reward, args, prompts(32), None, gold_reward=wanted_words)
    trainer.train()
    weights = trainer.discriminator.reward.model.parameters()
    return {
        **{key: logged(trainer, key) for key in KEYS},
        "logged": sorted({key for log in trainer.state.log_history for key in log if NEW.match(key)}),
        "weights": [weight.double().square().sum().item() for weight in weights],
    }


if __name__ == "__main__":
    found = train(sys.argv[1], sys.argv[2], Path(sys.argv[3]), 2)
    Path(sys.argv[3]).with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
