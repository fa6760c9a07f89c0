"""benchmarks/gpu/check.py on tiny shapes: stages run apart, and what fails or hangs costs no other."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align.cli.main import main
from benchmarks.gpu import check, several
from benchmarks.gpu.common import SMALL, Setting, run_parts
from benchmarks.gpu.summary import table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Those that start vLLM (`on_policy`, `rollouts`, `servers`, `several`) run in .ci/run; `device_tests` is part of
    this suite."""
    folder = tmp_path_factory.mktemp("check")
    command = [sys.executable, "benchmarks/gpu/check.py", "--device", "cpu", "--small", "--stages", "pairs", "memory"]
    command += ["--output", str(folder / "check.jsonl"), "--summary", str(folder / "check.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "dpo_small_live" in (folder / "check.md").read_text()
    return {line["stage"]: line for line in map(json.loads, (folder / "check.jsonl").read_text().splitlines())}


def test_pairs_against_trl(lines):
    line = lines["pairs"]
    assert (line["status"], line["small"], line["card"][:4]) == ("ok", True, "CPU:") and "running" not in line["result"]
    for name in ("dpo_small_live", "dpo_small_cached"):
        found = line["result"][name]
        assert found["largest_relative_difference_of_losses"] < 1e-4
        ours, theirs = (found[side]["tokens_per_second"] for side in ("ours", "trl best"))
        (ratio,) = found["times_faster_than_trl"]["each"]
        assert ratio == pytest.approx(ours / theirs, rel=0.01)
        tried = set(found["trl_settings_tried"]["seconds"])
        # what was TRL's fastest with a live reference is taken with a cached one
        assert tried == {"2 per micro-batch, sorted", "whole step"} if "live" in name else len(tried) == 1
    for name in ("sparsepo", "reward"):
        assert line["result"][name]["tokens_per_second"] > 0


def test_memory_against_the_estimate(lines):
    result = lines["memory"]["result"]
    assert 0.5 < result["dpo"]["estimate_over_peak"] < 2
    estimated = {name: found["estimated_gib"] for name, found in result.items()}
    assert estimated["dpo_lora"] < estimated["dpo"] > estimated["dpo_checkpointing"]


def test_a_stage_that_hangs_is_stopped(monkeypatch):
    args = argparse.Namespace(device="cpu", small=True, logs=None, parts=None)
    line = check.run_stage("machine", args, 0.1, dict(os.environ))
    assert line["status"] == "timed out" and line["result"] == {}
    broken = check.run_stage("machine", args, 60, {**os.environ, "PYTHONHOME": "/nowhere"})  # it cannot even start
    assert broken["status"] == "failed" and broken["output_tail"]
    assert "| machine | timed out |" in table([line, broken])


def test_stages_of_a_turn_run_beside_each_other_and_say_where_they_were_stopped():
    """`machine` needs seconds for its imports; stages of 0.3 s each are over before one after the other would be."""
    args = argparse.Namespace(device="cpu", small=True, logs=None, parts=None)
    start = time.perf_counter()
    lines = list(check.run_turn(dict.fromkeys(("machine", "memory", "pairs"), 0.3), args, dict(os.environ)))
    assert time.perf_counter() - start < 0.9
    assert {line["stage"]: line["beside"] for line in lines} == {
        "machine": ["memory", "pairs"], "memory": ["machine", "pairs"], "pairs": ["machine", "memory"]
    }  # fmt: skip
    assert all(line["status"] == "timed out" and line["stopped_in"] is None for line in lines)
    assert list(check.run_turn({}, args, {})) == []


def test_the_whole_ends_within_its_limit(monkeypatch, tmp_path):
    """The last stage gets what the others left, and none of it where they left nothing."""
    output = tmp_path / "check.jsonl"
    stages = ["--stages", "machine", "pairs", "on_policy"]
    monkeypatch.setattr(sys, "argv", ["check.py", "--device", "cpu", "--small", *stages, "--output", str(output)])
    monkeypatch.setattr(check, "TURNS", ({"machine": 0.05}, {"pairs": 0.05}, {"on_policy": 1.0}))
    for whole, last in ((0.15, 0.5), (0.05, 0.0)):
        monkeypatch.setattr(check, "WHOLE", whole)
        start = time.perf_counter()
        assert check.main() == 1 and time.perf_counter() - start < whole * check.CPU_FACTOR + 0.5
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line["stage"] for line in lines] == ["machine", "pairs", "on_policy"]
        assert lines[-1]["limit"] == pytest.approx(last, abs=0.3)


def test_a_part_that_fails_costs_no_other():
    def bad():
        raise RuntimeError("the allocator gave up")

    parts = [("first", bad), ("second", lambda: {"number": 1}), ("third", lambda: "skipped: needs a GPU")]
    written = list(run_parts(Setting("cpu", True), parts))
    assert [part["running"] for part in written if "running" in part] == ["first", "second", "third", None]
    found = {name: value for part in written for name, value in part.items() if name != "running"}
    assert "the allocator gave up" in found["first"]["failed"] and found["second"]["number"] == 1
    assert check.status(0, found) == "failed"
    assert check.status(0, {"card": "x", "third": found["third"]}) == "skipped"
    assert check.status(0, {"card": "x", "second": found["second"], "third": found["third"]}) == "ok"
    assert check.status(None, found) == "timed out" and check.status(1, {}) == "failed"


def test_the_limits_are_what_the_page_says():
    page = (ROOT / "docs/hardware.md").read_text()
    for name, limit in check.STAGES.items():
        assert f"| `{name}` | {limit} |" in page
    assert f"{check.WHOLE // 60}:{check.WHOLE % 60:02}" in page and "less than 8 minutes" in page
    last = check.WHOLE - sum(max(turn.values()) for turn in check.TURNS[:-1])
    assert f"at least {last} seconds" in page


def test_several_gpus(monkeypatch, tmp_path):
    """Every part is a command that `align launch` takes; what needs more GPUs than there are says so."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(several, "choose_backend", lambda name: "vllm")
    monkeypatch.setattr(several.torch.cuda, "device_count", lambda: 3)
    told = dict(several.parts(SimpleNamespace(device="cuda", small=True, first_shape=SMALL, dtype=torch.float32)))
    assert list(told) == list(several.RUNS)
    assert [told[name]() for name in told if several.RUNS[name][0] > 3] == ["skipped: needs 4 GPUs"]
    config = several.write_run(Setting("cpu", True), tmp_path)
    for gpus, words, options in several.RUNS.values():
        assert main(["launch", str(config), *words.split(), *options, "--dry-run"]) == 0, (words, gpus)


def test_a_run_on_several_gpus_that_fails_says_why(tmp_path):
    (tmp_path / "run.yaml").write_text("method: rloo\nlearning_rat: 1\n")
    found = several.launched(tmp_path / "run.yaml", "--cpu --num-processes 1", [])
    assert "status 2: " in found["failed"] and "learning_rat" in found["failed"]
