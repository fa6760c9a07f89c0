"""Which checkpoints `save_total_limit` leaves."""

import os
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from align.distributed.checkpoints import newest_whole, remove_older
from align.trainers.sft import SFTTrainer
from tests.trainers.tiny_runs import demonstrations, sft_config


class ClockSetBack(TrainerCallback):
    """After each checkpoint the clock goes back by an hour: those that are there are of the future."""

    def on_save(self, args, state, control, **kwargs):
        for path in Path(args.output_dir).glob("checkpoint-*"):
            os.utime(path, (time.time() + 36000 - 3600 * state.global_step,) * 2)


def test_a_clock_that_is_set_back_deletes_no_new_checkpoint(policy, tmp_path):
    args = sft_config(tmp_path, save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=1)
    SFTTrainer(policy, args, demonstrations(22), callbacks=[ClockSetBack()]).train()
    assert newest_whole(tmp_path).name == "checkpoint-3"


@pytest.mark.parametrize(
    ("step", "limit", "best", "left"),
    [
        (6, 2, None, [4, 6]),
        (6, 2, 2, [2, 6]),
        (6, 1, 2, [2, 6]),
        (4, 2, None, [2, 4]),  # 6 and 8 are of an earlier run, or damaged
        (4, 3, None, [2, 4, 6]),
        (2, 1, 8, [2, 8]),
        (2, None, None, [2, 4, 6, 8]),
    ],
)
def test_age_is_by_steps_and_the_best_is_known_by_any_path(step, limit, best, left, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (2, 4, 6, 8)[: 3 if step == 6 else 4]:
        Path(f"run/checkpoint-{number}").mkdir(parents=True)
    remove_older(tmp_path / "run", step, limit, best and f"run/checkpoint-{best}")
    assert sorted(path.name for path in Path("run").iterdir()) == [f"checkpoint-{number}" for number in left]
