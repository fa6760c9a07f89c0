"""The model of docs/scaling.md: its parts by hand, and the page's numbers."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import GPUS, RUNS, all_tables, generate, push, step, train

ROOT = Path(__file__).parents[2]
SEVEN, SEVENTY = RUNS
ONE_SAMPLE = replace(SEVEN, prompts=1, num_generations=1, prompt_tokens=0, completion_tokens=100)


def test_one_sample_reads_the_weights_once_per_token():
    given = {"decode_share": 1.0, "longest": 1.0, "memory": 1e12}
    of_weights = 100 * 2 * SEVEN.parameters / 1e12
    of_keys = 100 * 50 * SEVEN.kv_bytes / 1e12  # 50 tokens on average
    assert generate(ONE_SAMPLE, 1, given) == pytest.approx(of_weights + of_keys)


def test_training_counts_the_flops_of_the_docstring():
    given = {"mfu": 1.0, "prefill_mfu": 1.0, "matmul": 1e15}
    parts = train(SEVEN, 4, given)
    assert parts["train"] == pytest.approx(8 * SEVEN.parameters * SEVEN.tokens / 4e15)
    assert parts["forward"] == pytest.approx(4 * SEVEN.parameters * SEVEN.tokens / 4e15)
    slow = train(SEVEN, 4, given | {"inside": 1e9})
    moved = SEVEN.tokens / 4 / 16384 * 8 * SEVEN.parameters * 0.75 / 1e9
    assert parts["shards"] == 0 and slow["shards"] == pytest.approx(moved - slow["train"])


def test_an_adapter_is_sent_alone_to_servers_of_one_gpu():
    alone = replace(SEVENTY, tensor_parallel=1)
    assert push(alone, 8) == pytest.approx(0.003 * push(SEVENTY, 8))


@pytest.mark.parametrize("name", list(all_tables()))
def test_more_gpus_are_never_slower(name):
    rows = [row["ahead"] for row in all_tables()[name].values() if row]
    assert len(rows) >= 8 and rows == sorted(rows, reverse=True)
    assert step(SEVENTY, 2) is None


def test_the_page_and_the_file_have_its_numbers():
    tables = all_tables()
    saved = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())["runs"]
    for name, rows in tables.items():
        for gpus in GPUS:
            assert (saved[name][str(gpus)] or {}).get("ahead") == (rows[gpus] and round(rows[gpus]["ahead"], 2))
    page = (ROOT / "docs" / "scaling.md").read_text()
    rows = re.findall(r"^\| (?:7B|70B).*\|$", page, re.MULTILINE)
    for row, table in zip(rows, tables.values(), strict=True):
        for cell, gpus in zip(row.split("|")[2:6], (8, 32, 128, 1024), strict=True):
            seconds, division = re.match(r" ([\d,]+)(?: \((\d+)[^,]*, (\d+)[^)]*\))?", cell).group(1, 2)
            assert int(seconds.replace(",", "")) == round(table[gpus]["ahead"])
            assert division is None or int(division) == table[gpus]["trainers"]
