"""What trackers really get, read back from the folders of the runs."""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict

import pytest

from align.trainers.remax import ReMaxTrainer
from align.trainers.sft import SFTTrainer
from tests.trainers.tiny_runs import demonstrations, logged, prompts, remax_config, sft_config, wanted_words

GOLD = {"type": "rule", "function": "align.data.toy:gold", "name": "gold"}


def wandb_history(folder) -> tuple[list[dict], str]:
    """The logged rows of the one offline run under `folder`, and the folder of its files."""
    (found,) = wandb_histories(folder)
    return found


def wandb_histories(folder) -> list[tuple[list[dict], str]]:
    """The same of all runs, the first one first."""
    import wandb

    wandb.finish()
    wandb.teardown()  # ends the process that writes
    runs = sorted(folder.glob("wandb/offline-run-*"), key=lambda run: (run / "logs").stat().st_ctime)
    return [_history(run) for run in runs]


def _history(run) -> tuple[list[dict], str]:
    from wandb.proto.wandb_internal_pb2 import Record

    (log,) = run.glob("*.wandb")
    rows = []
    for data in leveldb_records(log.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                target = row.setdefault(name, {}) if inner else row
                target["/".join(inner) or name] = json.loads(item.value_json)
            rows.append(row)
    return rows, run / "files"


def leveldb_records(data: bytes) -> list[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB, each piece with a header (CRC 4, length 2, type 1)."""
    place, block, records, pieces = 7, 32768, [], []  # 7: the file's own header
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pieces.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(b"".join(pieces))
            pieces = []
    return records


def test_remax_in_wandb_and_tensorboard(policy, wandb_offline):
    folder = wandb_offline / "run"
    args = remax_config(
        folder, max_steps=4, eval_strategy="steps", eval_steps=2, report_to=["wandb", "tensorboard"], run_name="toy run"
    )
    trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16), prompts(10, seed=1), gold_reward=GOLD)
    trainer.train()
    rows, files = wandb_history(wandb_offline)
    by_step = defaultdict(dict)
    for row in rows:
        by_step[row["train/global_step"]] |= row
    # one step counter, and the numbers are those of the run
    counter = [row["train/global_step"] for row in rows]
    assert counter == sorted(counter) and set(counter) == {0, 1, 2, 3, 4}
    for name in ("loss", "reward", "kl", "entropy", "rewards/wanted_words", "rollout/mean_abs_logp_diff"):
        assert [by_step[step][f"train/{name}"] for step in range(1, 5)] == pytest.approx(logged(trainer, name))
    for name in ("kl", "kl_k3", "proxy", "gold", "entropy", "length"):
        assert [by_step[step][f"eval/{name}"] for step in (0, 2, 4)] == pytest.approx(logged(trainer, f"eval_{name}"))
    numbers = [value for row in rows for value in row.values() if isinstance(value, int | float)]
    assert len(numbers) > 100 and all(map(math.isfinite, numbers))
    # the table of completions of each evaluation
    tables = [row["completions"] for row in rows if "completions" in row]
    assert len(tables) == 3
    for number, table in enumerate(tables):
        content = json.loads((files / table["path"]).read_text())
        assert content["columns"] == ["step", "prompt", "completion", "proxy", "gold"] and len(content["data"]) == 8
        assert {line[0] for line in content["data"]} == {2 * number}
        assert content["data"][0][1] == trainer.eval_dataset[0]["prompt"]
    # the figure of the curve
    (figure,) = [row["overoptimization"] for row in rows if "overoptimization" in row]
    assert (files / figure["path"]).read_bytes()[:4] == b"\x89PNG" and figure["width"] > 400
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.glob("**/events.out.*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert [event.step for event in board.Images("overoptimization")] == [4]
    assert [event.value for event in board.Scalars("eval/gold")] == pytest.approx(logged(trainer, "eval_gold"))


def test_sft_in_wandb(policy, wandb_offline):
    args = sft_config(wandb_offline / "run", max_steps=3, report_to="wandb", eval_strategy="steps", eval_steps=3)
    trainer = SFTTrainer(policy, args, demonstrations(16), demonstrations(8, seed=1))
    trainer.train()
    rows, _ = wandb_history(wandb_offline)
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(logged(trainer, "loss"))
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == pytest.approx(logged(trainer, "eval_loss"))
    assert [row["train/global_step"] for row in rows] == sorted(row["train/global_step"] for row in rows)


def test_trainers_of_one_process_have_a_run_each(policy, wandb_offline):
    """In wandb; what is logged after a training, or when it goes on, is in its run. A run of `wandb.init` holds all."""
    import wandb

    def trained(name: str, steps: int) -> SFTTrainer:
        args = sft_config(wandb_offline / name, max_steps=steps, report_to="wandb", run_name=name)
        trainer = SFTTrainer(policy, args, demonstrations(16))
        trainer.train()
        return trainer

    trained("one", 3)
    wandb.log({"afterwards": 1})
    trainer = trained("two", 2)
    trainer.train()
    assert wandb.run.name == "two"
    wandb.finish()
    with wandb.init(name="mine") as run:
        trained("three", 1)
        trained("four", 1)
        assert wandb.run is run
        wandb.log({"afterwards": 2})
    runs = [rows for rows, _ in wandb_histories(wandb_offline)]
    steps = [[row["train/global_step"] for row in rows if "train/loss" in row] for rows in runs]
    assert steps == [[1, 2, 3], [1, 2, 1, 2], [1, 1]]
    assert [rows[-1].get("afterwards") for rows in runs] == [1, None, 2]


@pytest.mark.parametrize("named", [False, True])
def test_a_resumed_run_goes_on_in_its_run_in_wandb(policy, wandb_offline, monkeypatch, named):
    """Unless the environment names one, or the checkpoint is of another run's folder."""
    import wandb

    def trained(name: str, steps: int, resume=None) -> str:
        args = sft_config(wandb_offline / name, max_steps=steps, report_to="wandb", save_strategy="steps", save_steps=2)
        SFTTrainer(policy, args, demonstrations(16)).train(resume_from_checkpoint=resume)
        found = wandb.run.id
        wandb.finish()
        return found

    first = trained("one", 2)
    if named:
        monkeypatch.setenv("WANDB_RUN_ID", "mine")
        wandb.teardown()  # which has read the environment
    assert trained("one", 4, True) == ("mine" if named else first)
    if not named:
        assert trained("two", 4, str(wandb_offline / "one" / "checkpoint-2")) != first
        assert trained("one", 2) != first  # anew


def test_every_metric_is_finite_and_averaged_between_logs(policy, tmp_path):
    """Logged every second step: each value is the mean of what is logged every step."""
    found = []
    for every in (1, 2):
        args = remax_config(tmp_path, max_steps=4, logging_steps=every)
        trainer = ReMaxTrainer(policy, wanted_words, args, prompts(16))
        trainer.train()
        found.append(trainer)
    for name in ("loss", "reward", "kl", "completions/mean_length"):
        one, two = (logged(trainer, name) for trainer in found)
        assert two == pytest.approx([(a + b) / 2 for a, b in zip(one[::2], one[1::2], strict=True)])
    phases = {"time/sync", "time/generate", "time/score", "time/reference", "time/train"}
    assert phases <= set(found[0].state.log_history[0])
    values = [v for entry in found[0].state.log_history for v in entry.values() if isinstance(v, float)]
    assert len(values) > 60 and all(map(math.isfinite, values))


CHECK = """
import {first}
import align.trainers
from huggingface_hub import constants
print(constants.HF_HUB_DISABLE_TELEMETRY)
"""


@pytest.mark.parametrize(
    "first, setting, off", [("os", None, True), ("huggingface_hub", None, True), ("huggingface_hub", "0", False)]
)
def test_telemetry_of_dependencies_is_off(first, setting, off):
    """Also when the hub's library was imported before ours; a user's own setting counts."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
    if setting is not None:
        environment |= {"HF_HUB_DISABLE_TELEMETRY": setting, "DO_NOT_TRACK": setting}
    code = [sys.executable, "-c", CHECK.format(first=first)]
    result = subprocess.run(code, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(off)
