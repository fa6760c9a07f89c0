"""`align quickstart --small`: killed, started again, and what it leaves behind."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from align.data import toy
from align.errors import ConfigError
from align.evaluation.summary import read_summary
from align.quickstart.parts import RUNS
from align.quickstart.phases import judged
from align.quickstart.progress import PhaseProgress
from align.quickstart.settings import SMALL
from align.quickstart.workspace import Workspace

ROOT = Path(__file__).parents[2]
ENGINE = ["--backend", "transformers"]  # vLLM would start six times; `.ci/run` runs the same with vLLM after the tests


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "align", "quickstart", "--small", "--output_dir", str(folder), *ENGINE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def killed_and_continued(tmp_path_factory):
    """The folder of a quickstart that was killed in its third phase, and the output of the start that finished it."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    first = start(folder)
    state = folder / "phases.json"
    deadline = time.monotonic() + 300
    while not (state.exists() and "preference pairs" in json.loads(state.read_text())["phases"]):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline, "the first two phases took more than five minutes"
        time.sleep(0.2)
    workers = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert len(workers) >= 2 and not alive  # a phase that went on would write what the next start writes
    before = {path: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}
    before[folder / "sft" / "model.safetensors"] = (folder / "sft" / "model.safetensors").stat().st_mtime_ns
    second = start(folder)
    output = second.communicate(timeout=600)[0]
    assert second.returncode == 0, output
    return folder, before, output


def test_continues_after_the_last_finished_phase(killed_and_continued):
    folder, before, output = killed_and_continued
    assert "supervised fine-tuning: finished earlier, kept" in output
    assert "preference pairs: finished earlier, kept" in output
    assert "[3/10] reward model 0" in output
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_engine_is_vllm_where_it_is_installed():
    from align.rollout.make import choose_backend

    installed = importlib.util.find_spec("vllm") is not None
    assert choose_backend("auto") == ("vllm" if installed else "transformers")


def test_summary_and_report(killed_and_continued):
    folder, _, output = killed_and_continued
    summary = read_summary(folder)
    assert set(summary["runs"]) == set(RUNS) == {"single proxy", "worst case", "uncertainty-weighted"}
    assert {"single proxy", "ensemble mean", "worst case", "uncertainty-weighted"} < set(summary["best_of_n"])
    for run in summary["runs"].values():
        assert run["step"] == [0, 2, 4, 6] and abs(run["kl"][0]) < 1e-5
    gold = summary["best_of_n"]["gold itself"]
    assert gold["n"][0] == 1 and gold["gold"] == pytest.approx(gold["proxy"])
    assert sorted(gold["gold"]) == gold["gold"]  # choosing by gold can only help
    assert len(summary["reward_models"]) == 3
    assert set(summary["phases"]) == {
        "supervised fine-tuning", "preference pairs", *(f"reward model {i}" for i in range(3)), "best-of-n",
        *(f"ReMax: {name}" for name in RUNS),
    }  # fmt: skip
    report = (folder / "report.html").read_text()
    assert "report.html" in output
    for name in RUNS:
        assert name in report


def test_the_label_noise_is_the_stored_one(killed_and_continued):
    folder, _, _ = killed_and_continued
    rows = {
        name: [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train_pairs", "train_pairs_noisy")
    }
    flipped = json.loads((folder / "data" / "flipped_labels.json").read_text())
    assert len(flipped["rows"]) == round(SMALL.label_noise * len(rows["train_pairs"]))
    for i, (clean, noisy) in enumerate(zip(rows["train_pairs"], rows["train_pairs_noisy"], strict=True)):
        assert (clean["chosen"] == noisy["rejected"]) == (i in set(flipped["rows"]))


def test_pairs_are_judged_by_annotators_in_turn():
    first, second = (partial(toy.annotator_score, word=word, fondness=1.5) for word in ("so", "well"))
    prompt, answers = {"prompt": "describe the garden : ", "topic": "garden"}, ["rose so", "rose well"]
    rows = judged([prompt] * 5, [answers, answers, ["rose", "rose"], ["rose", ""], answers], [first, second])
    assert [row["chosen"] for row in rows] == ["rose so", "rose well", "rose so"]  # of five one ties, one is empty
    assert [row["rejected"] for row in rows] == ["rose well", "rose so", "rose well"]
    assert judged([prompt], [answers], [toy.gold_score]) == []  # worth the same in gold


def test_every_reward_model_learns_from_one_annotator(killed_and_continued):
    """Before labels are flipped, every pair is as the annotator of its member judges it."""
    folder, _, _ = killed_and_continued
    rows = [json.loads(line) for line in (folder / "data" / "train_pairs.jsonl").read_text().splitlines()]
    words = json.loads((folder / "phases.json").read_text())["phases"]["preference pairs"]["result"]["words"]
    assert words == toy.favourite_words(SMALL.members, 0)
    by_gold_alone = 0
    for i, row in enumerate(rows):
        judge = partial(toy.annotator_score, row["topic"], word=words[i % SMALL.members], fondness=SMALL.fondness)
        assert judge(row["chosen"]) > judge(row["rejected"])
        by_gold_alone += toy.gold_score(row["topic"], row["chosen"]) > toy.gold_score(row["topic"], row["rejected"])
    assert by_gold_alone < len(rows)


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    Workspace(tmp_path, {"seed": 0})
    with pytest.raises(ConfigError, match="other settings"):
        Workspace(tmp_path, {"seed": 1})


def test_time_left_follows_the_pace(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("align.quickstart.progress.time.perf_counter", lambda: now[0])
    progress = PhaseProgress({"a": 10.0, "b": 30.0}, Console(file=(tmp_path / "out").open("w")))
    assert progress.left() == 40.0
    progress.begin("a")
    now[0] = 20.0  # half of the expected pace
    progress.update("a", 1.0)
    assert progress.left() == pytest.approx(60.0)
    progress.end("a")
    with progress.phase("b") as handle:
        now[0] = 50.0
        handle.update(0.5)
        assert progress.left() == pytest.approx(30.0)


def test_time_left_counts_all_phases_that_run(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("align.quickstart.progress.time.perf_counter", lambda: now[0])
    progress = PhaseProgress({"a": 10.0, "b": 30.0, "c": 20.0}, Console(file=(tmp_path / "out").open("w")))
    progress.skip("c")
    for name, fraction in (("a", 0.5), ("b", 0.5)):
        progress.begin(name)
        progress.update(name, fraction)
    now[0] = 10.0
    assert progress.left() == pytest.approx(10.0)
