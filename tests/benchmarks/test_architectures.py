"""The record of architectures: the command finds what is there, and what differs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.architectures import STAGES, all_types, exceptions, outcome, read
from benchmarks.tiny.configs import tiny_config
from benchmarks.tiny.stages import Unlike, agree, close_in_bfloat16, same_steps

ROOT = Path(__file__).parents[2]


def command(output: Path, *kinds: str) -> str:
    line = [sys.executable, "benchmarks/architectures.py", "--types", *kinds, "--output", str(output)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_types(tmp_path):
    """A dense one with every stage, and a mixture without a class for reward models; what the file has is kept."""
    output = tmp_path / "found.jsonl"
    kept = {"type": "gemma", "transformers": "0", "stages": {"model": {"failed": "before"}}}
    output.write_text(json.dumps(kept) + "\n")
    command(output, "gemma", "qwen2", "olmoe")
    found = read(output)
    assert found.pop("gemma") == kept and found.keys() == {"olmoe", "qwen2"}
    for kind, entry in found.items():
        assert tuple(entry["stages"]) == STAGES
        expected = {stage: "ok" for stage in STAGES}
        if kind == "olmoe":
            expected |= {"reward": "refused", "reward padded": "not tried"}
        assert {stage: outcome(entry, stage) for stage in STAGES} == expected, exceptions(entry)
    assert "experts" in found["olmoe"]["stages"]["dpo lora"]["ok"]["adapted"]


def test_every_text_type_of_transformers_is_known():
    assert {"llama", "qwen3", "gemma3", "mistral3"} <= set(all_types())
    assert tiny_config("qwen3_next").layer_types == ["linear_attention", "full_attention"]


def test_what_differs_is_told():
    steps = {"losses": [0.69, 0.65], "gradients": [2.0, 3.0], "chosen": [-20.0]}
    assert same_steps(steps, steps)["losses, step 1"] == 0
    for name, values in (("losses", [0.6901, 0.65]), ("gradients", [2.001, 3.0]), ("gradients", [2.0, 3.01])):
        with pytest.raises(Unlike, match=f"{name} of step"):
            same_steps(steps | {name: values}, steps)
    with pytest.raises(Unlike, match="in bfloat16 and in float32"):
        close_in_bfloat16(steps | {"chosen": [-21.0]}, steps)
    with pytest.raises(Unlike, match="not all are finite"):
        agree("scores", torch.tensor([float("nan")]), torch.zeros(1))
