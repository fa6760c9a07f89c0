"""The lines that a run prints, and the file of all its numbers."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from align.errors import DataError
from align.evaluation.metrics_file import MetricsWriter, read_metrics
from align.evaluation.watch import snapshot
from align.trainers.core.console import Console, duration
from align.trainers.sft import SFTConfig, SFTTrainer
from tests.trainers.tiny_runs import QUIET, demonstrations, on_policy, prompts, wanted_words

LINE = re.compile(r"^\d\d:\d\d:\d\d  step ( ?\d+)/(\d+)  left +(\?|\d:\d\d:\d\d)  (train|eval )  (.*)$")


def test_a_line_per_log_and_all_numbers_in_the_file(policy, tokenizer, tmp_path, capsys):
    trainer_class, args = on_policy(
        "remax", tmp_path, max_steps=10, logging_steps=5, eval_strategy="steps", eval_steps=5
    )
    trainer = trainer_class(policy, wanted_words, args, prompts(12), prompts(4), tokenizer)
    trainer.train()
    lines = [LINE.match(line) for line in capsys.readouterr().out.splitlines()[:-1]]
    assert all(lines), lines
    assert [(int(line[1]), line[4].strip()) for line in lines] == [
        (0, "eval"), (5, "train"), (5, "eval"), (10, "train"), (10, "eval"),
    ]  # fmt: skip
    assert lines[0][3] == "?" and lines[1][3] != "?"
    names = re.findall(r"[a-z][a-z ]*?(?= +-?[\d.])", lines[1][5])
    assert names == ["reward", "kl", "entropy", "length", "grad", "lr"]
    for kind in ("train", "eval "):  # as wide at every step
        assert len({len(line[0]) for line in lines if line[4] == kind}) == 1
    metrics = read_metrics(tmp_path)
    assert metrics.header["method"] == "ReMax" and metrics.header["max_steps"] == 10
    assert [log["step"] for log in metrics.logs if "rollout/effective_sample_size" in log] == [5, 10]
    logged = [{k: v for k, v in entry.items() if k != "at"} for entry in metrics.logs]
    assert logged[:-1] == [{"step": e["step"], **e} for e in trainer.state.log_history[:-1]]
    assert {"train", "generate"} <= set(snapshot(tmp_path)["phases"])


def test_a_resumed_run_repeats_what_came_after_its_checkpoint(policy, tokenizer, tmp_path):
    def train(**options):
        args = SFTConfig(
            str(tmp_path), max_length=64, **{**QUIET, "save_strategy": "steps", "save_steps": 2, **options}
        )
        trainer = SFTTrainer(policy, args, demonstrations(16), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint="auto")
        return [entry["step"] for entry in read_metrics(tmp_path).logs if "loss" in entry]

    assert train(max_steps=3, save_only_model=False) == [1, 2, 3]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 9')  # the process was killed
    assert train(max_steps=5, resume_changes=["max_steps"]) == [1, 2, 3, 4, 5]
    header = read_metrics(tmp_path).header
    assert header["max_steps"] == 5


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(path)
    for content, sentence in (('{"format": "other"}\n', "line 1 is not the header"), ("{\n", "line 1 is not valid")):
        path.write_text(content)
        with pytest.raises(DataError, match=sentence):
            read_metrics(path)
    path.write_text(json.dumps({"format": "align.metrics/1"}) + "\n[1]\n")
    with pytest.raises(DataError, match="line 2 is not a log"):
        read_metrics(path)


def test_a_resumed_run_has_its_own_settings_and_those_before_it(tmp_path, caplog):
    for resume, rate in ((None, 1.0), (5, 2.0), (7, float("inf"))):
        writer = MetricsWriter(tmp_path, {"max_steps": 9, "settings": {"max_grad_norm": rate}}, resume)
        writer.write({"step": (resume or 0) + 4, "loss": float("nan")})
    found = read_metrics(tmp_path)
    assert found.header["settings"] == {"max_grad_norm": "inf"} and found.logs[-1] == {"step": 11, "loss": None}
    assert [log["step"] for log in found.logs] == [4, 11]
    assert [(e["settings"]["max_grad_norm"], e["until"]) for e in found.header["earlier"]] == [(1.0, 5), (2.0, 7)]
    assert "NaN" not in writer.path.read_text() and "earlier" not in found.header["earlier"][1]
    writer.path.write_text(writer.path.read_text() + "{\n")  # damaged: the run goes on all the same
    MetricsWriter(tmp_path, {"max_steps": 9}, 11)
    assert read_metrics(tmp_path).logs == [] and "line 4 is not valid JSON" in caplog.text
    assert "metrics.1.old.jsonl" in caplog.text and (tmp_path / "metrics.1.old.jsonl").exists()
    MetricsWriter(tmp_path, {"max_steps": 9}, None)
    assert "metrics.jsonl is of an earlier run: kept as metrics.2.old.jsonl" in caplog.text


def state(step=5, main=True, max_steps=100):
    return SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=main)


def test_only_the_first_process_prints(capsys):
    for main in (False, True):
        Console(bar=True).on_log(None, state(main=main), None, {"loss": 0.5})
        assert bool(capsys.readouterr().out) is main


def test_on_a_terminal_the_bar_is_below_the_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    console = Console(bar=True)
    console.on_train_begin(None, state(step=40), None)
    assert console.training_bar.n == 40  # a resumed run
    console.on_step_end(None, state(step=41), None)
    console.on_log(None, state(step=41), None, {"loss": 0.5})
    console.on_train_end(None, state(step=41), None)
    printed = capsys.readouterr()
    assert LINE.match(printed.out.strip()) and "41/100" in printed.err


def test_evaluation_sets_and_weights_have_their_numbers(capsys):
    console = Console(bar=False)
    console.on_log(
        None, state(), None, {"eval_math_loss": 1.5, "eval_math_mean_token_accuracy": 0.25, "eval_rewards/my_loss": 3}
    )
    assert capsys.readouterr().out.split("left")[1].split()[1:] == "eval math loss 1.5 token acc 0.25".split()
    logs = {"reward": 1, "constraints/task_weight": 1, "constraints/polite_above/value": 3}
    logs |= {"constraints/polite_above/multiplier": 0.5}
    console.on_log(None, state(), None, {**logs, "dynamic_weights/a": 2, "dynamic_weights/influence/a": 7})
    shown = "reward 1 polite_above 3 mult polite_above 0.5 weight a 2"
    assert capsys.readouterr().out.split("train")[1].split() == shown.split()


@pytest.mark.parametrize("seconds, text", [(3.6, "0:00:04"), (86399, "23:59:59"), (200000, "2d 07:33")])
def test_durations(seconds, text):
    assert duration(seconds) == text
