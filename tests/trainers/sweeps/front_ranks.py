"""A sweep with a soup on two processes; each reads the front when its sweep ends. Run as a script: policy, folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig

from align.evaluation.front import read_front
from align.trainers.sweeps.front import train_front
from tests.trainers.test_modpo import config, exact_pairs, letters

if __name__ == "__main__":
    policy, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    options = {"weights": "sweep", "sweep_points": 2, "interpolate": 1, "max_steps": 1}
    args = config(folder / "run", per_device_train_batch_size=10, **options)
    lora = LoraConfig(r=4, target_modules="all-linear")
    points = read_front(train_front(policy, letters, args, exact_pairs(), peft_config=lora)).points
    torch.save([point.kind for point in points], folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
