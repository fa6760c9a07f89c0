"""`align doctor` and `align check`: what passes, and that a fault is found and named with its remedy."""

import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from align.cli.main import main
from align.data import toy
from align.doctor import invariants, machine, short_runs
from align.doctor.lines import attempt
from align.errors import RolloutError, TrainingError
from align.methods import METHODS
from align.rollout import vllm_versions
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import tiny_model

REWARDS = "rewards={type: rule, function: tests.trainers.tiny_runs:wanted_words}"


def report(capsys, *argv: str) -> tuple[int, dict]:
    status = main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_doctor_passes_here_and_speaks_json(capsys):
    status, found = report(capsys, "doctor", "--backend", "transformers")
    by_name = {line["what"]: line for line in found["lines"]}
    assert status == 0 and found["passed"], [line for line in found["lines"] if line["state"] == "failed"]
    for name in (
        "python",
        "torch",
        "vllm",
        "device",
        "rollout engine",
        "a rollout",
        "a push of weights",
        "two processes",
    ):
        assert name in by_name
    assert "saved and read back" in by_name["a training step"]["found"]
    assert "21 tensors the same bit by bit" in by_name["a push of weights"]["found"]


def test_versions_outside_their_range_fail_with_the_command_that_mends_them():
    wanted = Requirement("trl>=1.16,<1.17")
    assert machine.version_line(wanted, "1.16.0", "1.16.0").found == "1.16.0 (as tested)"
    assert machine.version_line(wanted, "1.16.3", "1.16.0").found == "1.16.3 (tested with 1.16.0)"
    for version in ("1.15.0", "1.17.0", None):
        line = machine.version_line(wanted, version, "1.16.0")
        assert line.state == "failed" and line.remedy == "pip install 'trl==1.16.0'"


def vllm_range() -> str:
    wanted = map(Requirement, importlib.metadata.requires(vllm_versions.DISTRIBUTION))
    return str(next(one.specifier for one in wanted if one.name == "vllm"))


def test_vllm_outside_the_range_of_its_extra_fails(monkeypatch):
    """The range is the package's own; as for every other package, the remedy is the command."""
    found = {"vllm": "0.24.0"}
    monkeypatch.setattr(vllm_versions, "installed", found.get)
    line = machine._engine_version({"vllm": "0.32.0"})
    assert (line.what, line.state) == ("vllm", "failed") and f"vllm 0.24.0, {vllm_range()} is needed" in line.found
    found["vllm"] = "0.32.0"
    assert machine._engine_version({"vllm": "0.32.0"}).found == "vllm 0.32.0 (as tested)"
    del found["vllm"]
    assert machine._engine_version({}).state == "note"


def test_a_name_that_another_vllm_has_not_is_an_error_with_the_range(monkeypatch):
    """Inside the range it is a bug of ours, whose traceback is wanted."""
    versions = {"vllm": "0.99.0"}
    monkeypatch.setattr(vllm_versions, "installed", versions.get)
    needed = f"vllm 0.99.0 is installed, {vllm_range()} is needed (no such name): pip install 'vllm{vllm_range()}'"
    with pytest.raises(RolloutError, match=re.escape(needed)), vllm_versions.known_names():
        raise ImportError("no such name")
    versions["vllm"] = "0.32.0"
    with pytest.raises(ImportError, match="no such name"), vllm_versions.known_names():
        raise ImportError("no such name")


def test_a_stage_that_breaks_is_a_line_and_the_exit_status_says_so(capsys, monkeypatch):
    def broken():
        raise RuntimeError("no\nsuch device")

    assert attempt("a", broken, "buy one").shown() == "failed  a: RuntimeError: no such device\n        -> buy one"
    monkeypatch.setattr(machine, "_two_processes", broken)
    monkeypatch.setattr(machine, "_step", lambda folder, made: broken())
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "failed  a training step" in shown and "skipped a rollout" in shown and "failed  two processes" in shown


@pytest.fixture
def config(tmp_path) -> Path:
    tokenizer = toy.tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    toy_pairs(16).to_json(tmp_path / "pairs.jsonl")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"method: dpo\nmodel_name_or_path: {tmp_path}/policy\ndataset_name: {tmp_path}/pairs.jsonl\nmax_length: 32\n"
        f"learning_rate: 0.005\nuse_cpu: true\nrun_name: r\noutput_dir: {tmp_path}/none\n"
    )
    return path


def watch_folders(monkeypatch) -> list[list[str]]:
    """What lies in the check's folder when each of its short runs begins: folders of models and of checkpoints."""
    seen, train = [], short_runs.Checker._train

    def watched(self, output, keep, **options):
        files = [path.parent for path in self.work.rglob("*.safetensors") if path.parent != output]
        folders = [str(path.relative_to(self.work)) for path in files]
        seen.append(folders)
        return train(self, output, keep, **options)

    monkeypatch.setattr(short_runs.Checker, "_train", watched)
    return seen


def test_the_invariants_hold(config, capsys, monkeypatch):
    """All but two processes, which tests/trainers/on_policy/test_two_processes.py has; nothing is written beside."""
    monkeypatch.setattr(invariants, "_ranks", lambda checker: "not here")
    before = sorted(config.parent.iterdir())
    seen = watch_folders(monkeypatch)
    status, found = report(capsys, "check", str(config), "--rows", "9", "--folder", str(config.parent))
    assert status == 0, found
    assert "on 9 rows" in found["lines"][0]["found"]
    saved = {name for names in seen for name in names}
    assert saved == {"4_at_once", "resumed/checkpoint-1"}  # one checkpoint, and of the models the one that is read
    assert len(found["lines"]) == 9 and {line["state"] for line in found["lines"]} == {"passed"}
    assert sorted(config.parent.iterdir()) == before


def test_a_broken_invariant_fails_its_line(config, capsys, monkeypatch):
    """A loss that depends on how many rows are in a batch, and a resume that draws something else."""
    from align.trainers.dpo import DPOTrainer

    step = DPOTrainer.training_step

    def uneven(self, model, inputs, num_items_in_batch=None):
        loss = step(self, model, inputs, num_items_in_batch)
        with torch.no_grad():
            if self.resumed is not None:
                next(model.parameters()).add_(1e-6)
        return loss * (1.1 if self.args.per_device_train_batch_size == 1 else 1.0)

    monkeypatch.setattr(DPOTrainer, "training_step", uneven)
    monkeypatch.setattr(
        invariants,
        "stages",
        lambda checker: [("accumulation", invariants._accumulation, "a"), ("resumed", invariants._resumed, "b")],
    )
    status, found = report(capsys, "check", str(config))
    assert status == 1
    accumulation, resumed = found["lines"][1:]
    assert accumulation["state"] == "failed" and "at most 0.001 (float32)" in accumulation["found"]
    assert resumed["state"] == "failed" and "differs by up to" in resumed["found"] and resumed["remedy"] == "b"


def first_rows(config, *options, rows=8):
    folder = config.parent / "short"
    folder.mkdir(exist_ok=True)
    return short_runs.Checker(str(config), list(options), rows, folder)


def test_the_first_rows_are_taken_of_a_slice_and_of_a_stream(config):
    assert len(first_rows(config, "dataset_train_split=train[2:]", rows=9).rows) == 9
    streamed = first_rows(config, "streaming=true")
    tokens = streamed.tokens(config.parent / "out")
    assert len(streamed.rows) == 8 and "--streaming=false" in tokens
    assert f"--dataset_name={config.parent}/short/rows.parquet" in tokens


def test_rows_that_cannot_be_used_are_passed_over(config, capsys):
    """What the run leaves out of a large dataset may be most of its first rows."""
    rows = toy_pairs(16).to_list()
    bad = [{**row, "prompt": row["prompt"] * 20} for row in rows[:5]] + [{**rows[5], "chosen": rows[5]["rejected"]}]
    pairs = config.parent / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in [*bad, *rows]))
    assert first_rows(config, "max_bad_share=0.5", rows=9).rows.to_list() == rows[:9]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in [*bad, *rows[:7]]))
    assert main(["check", str(config)]) == 2
    assert "of the first 13 rows 7 can be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "options", "state"),
    [
        ("kto", [], "passed"),
        ("sparsepo", [], "passed"),
        ("modpo", [REWARDS, "objective=better", "weights={better: 0.5, wanted_words: 0.5}"], "passed"),
        ("online_dpo", [REWARDS, "rollout.backend=transformers"], "passed"),
        ("dpo", ["loss_type=simpo"], "skipped"),
        ("dpo", ["ref_model_name_or_path=other"], "skipped"),
        ("remax", [REWARDS, "rollout.backend=transformers", "beta=0"], "skipped"),
    ],
)
def test_policy_and_reference_are_compared_where_they_are_one(config, capsys, monkeypatch, method, options, state):
    text = config.read_text().replace("method: dpo", f"method: {method}")
    if method in ("online_dpo", "remax"):
        text = text.replace("max_length: 32", "max_prompt_length: 16\nmax_completion_length: 6")
    config.write_text(text)
    tiny_model(toy.tokenizer(), seed=7).save_pretrained(config.parent / "other")
    monkeypatch.setattr(invariants, "stages", lambda checker: [("step 0", invariants._step_0, "")])
    monkeypatch.chdir(config.parent)
    status, found = report(capsys, "check", str(config), "--set", "beta=0.1", *options)
    assert status == 0 and [one["state"] for one in found["lines"]] == ["passed", state], found


@pytest.mark.parametrize("method", ["dpo", "metaapo"])
def test_a_second_step_is_compared_where_it_is_of_the_same_tokens(method, tmp_path):
    """After a rounding in the first one a policy that writes its own may have written something else."""

    def made(name, batching):
        second = 1.0 if batching == "padded" else 1.2
        logs = [{"loss": 0.7, "grad_norm": 1.0}, {"loss": 0.7, "grad_norm": second}]
        return short_runs.Result(logs, tmp_path, "bfloat16")

    checker = SimpleNamespace(method=method, run=SimpleNamespace(method=METHODS[method]), made=made)
    line = attempt("layouts", lambda: invariants._layouts(checker), "")
    assert line.state == ("failed" if method == "dpo" else "passed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "-3"], "--rows -3 is too few: two steps of four rows need 8"),
        (["--set", "dataset_train_split=train[:5]"], "there are 5 rows to train on"),
        (["--set", "max_steps=3"], "--set max_steps: the check sets this itself"),
        (["--set", "gradient-accumulation-steps=2"], "--set gradient_accumulation_steps: the check sets this itself"),
        (["--folder", "/nowhere"], "--folder /nowhere is not a folder"),
    ],
)
def test_what_the_check_cannot_use_is_refused(config, capsys, options, message):
    assert main(["check", str(config), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_room_is_refused_before_anything_trains(config, capsys, monkeypatch):
    monkeypatch.setattr(short_runs, "free_gib", lambda folder: 0.0001)
    status, found = report(capsys, "check", str(config))
    assert status == 1 and len(found["lines"]) == 1
    assert "which has 0.0 GiB free: name another --folder" in found["lines"][0]["found"]


def test_a_command_that_fails_or_hangs_shows_its_last_lines(capsys, monkeypatch):
    talk = "import sys, time; print('out'); print('the last word', file=sys.stderr, flush=True); "
    with pytest.raises(TrainingError, match=r"exit status 3: .*the last word"):
        invariants.run_shown([sys.executable, "-c", talk + "sys.exit(3)"], 60)
    with pytest.raises(TrainingError, match="not done after 2 s"):
        invariants.run_shown([sys.executable, "-c", talk + "time.sleep(60)"], 2)
    monkeypatch.setattr(invariants, "ENDING", 0.5)
    talk += "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork() or os.setsid(); "
    start = time.monotonic()  # the second process holds the pipe, and hears no signal either
    with pytest.raises(TrainingError, match="not done after 2 s"):
        invariants.run_shown([sys.executable, "-c", talk + "time.sleep(60)"], 2)
    assert time.monotonic() - start < 20
    assert "the last word" in capsys.readouterr().err
