"""{float32, bf16 autocast, bf16 weights} x {full, LoRA, QLoRA} x {one process, DDP, FSDP2} of every kind of method: it
starts, its curve is that of float32 up to the rounding of bfloat16, what it saves is what it trained, or it is refused.

The rows that docs/launching.md gives.
"""

import json

import pytest
import torch

from align.data import toy
from tests.trainers.core.matrix_ranks import rows, table
from tests.trainers.tiny_runs import tiny_model
from tests.trainers.two_processes import run_on_two

DISTANCE = 0.015
"""From float32's curve, over its largest value: one number is rounded by 0.4 % at most (8 bits), and in loss and norm
the errors of many cancel. The table's largest is 0.6 %; with transformers 5.24 it is 1.1 %."""
SETUPS = ("one", "ddp", "fsdp2")
LINES = [(setup, *row) for setup in SETUPS for row in rows(setup)]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("matrix")
    tokenizer = toy.tokenizer()
    # weights that bfloat16 holds exactly, as those of pretrained models, so that all rows start from the same ones
    tiny_model(tokenizer).bfloat16().float().save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    found = {"one": table(str(folder / "policy"), folder / "one", "one")}
    first, second = run_on_two(
        "tests.trainers.core.matrix_ranks", folder / "two", str(folder / "policy"), "ddp", "fsdp2"
    )
    assert first == second
    found |= first
    (folder / "table.json").write_text(json.dumps(found, indent=1))
    return found


@pytest.mark.parametrize("setup, method, precision, adapter", LINES, ids=map(", ".join, LINES))
def test_a_line_of_the_table(tables, setup, method, precision, adapter):
    found = tables[setup][f"{method}, {precision}, {adapter}"]
    if method in ("remax", "ppo") and adapter == "qlora":
        assert "rollouts do not support a quantised policy: load it without load_in_4bit" in found["refused"]
        return
    assert found.keys() == {"loss", "grad_norm"} and len(found["loss"]) == 3
    exact = tables["one"][f"{method}, float32, {adapter}"]
    for key in ("loss", "grad_norm"):
        distance = (torch.tensor(found[key]) - torch.tensor(exact[key])).abs()
        scale = torch.tensor(exact[key]).abs().max().clamp(min=0.5)
        assert (distance / scale).max() < DISTANCE, (key, found[key], exact[key])
