"""The evaluation file: what is written is read back, and damage is loud."""

import json
import logging
import random
import subprocess
import sys

import numpy as np
import pytest

from align.errors import ConfigError, DataError, TrainingError
from align.evaluation.records import FILE_NAME, EvalWriter, read_run
from tests.evaluation.synthetic import without_checksums

PROMPTS = 6


def writer(folder, resume_step=None, **changes):
    settings = {"name": "single", "method": "remax", "proxy": "rm0", "gold": "gold", "seed": 3, "config": {"beta": 0.0}}
    return EvalWriter(folder, **{**settings, **changes}, resume_step=resume_step)


def write(w, step, *, with_gold=True, **changes):
    rng = np.random.default_rng(step)
    values = {key: rng.normal(size=PROMPTS) for key in ("kl", "kl_k3", "proxy")}
    values["gold"] = rng.normal(size=PROMPTS) if with_gold else None
    values["length"] = rng.integers(1, 9, size=PROMPTS)
    values["samples"] = [{"prompt": "sea", "completion": f"wave {step}", "proxy": 1.0, "gold": 0.5}]
    w.write(step, **{**values, **changes})
    return values


def test_round_trip(tmp_path):
    w = writer(tmp_path)
    written = [write(w, step, entropy=float(step), members=np.full(PROMPTS, step)) for step in (0, 10, 20)]
    run = read_run(tmp_path)
    assert (run.name, run.method, run.proxy_name, run.gold_name, run.seed) == ("single", "remax", "rm0", "gold", 3)
    assert run.config == {"beta": 0.0}
    assert run.step.tolist() == [0, 10, 20]
    for key in ("kl", "kl_k3", "proxy", "gold", "length"):
        np.testing.assert_allclose(getattr(run, key), [np.mean(v[key]) for v in written])
        np.testing.assert_allclose(run.per_prompt[key], [v[key] for v in written], rtol=1e-7)
    assert run.extras["entropy"].tolist() == [0, 10, 20]
    assert run.per_prompt["members"].shape == (3, PROMPTS)
    assert [s[0]["completion"] for s in run.samples] == ["wave 0", "wave 10", "wave 20"]


def test_a_run_without_gold(tmp_path):
    w = writer(tmp_path, gold=None)
    write(w, 0, with_gold=False)
    assert read_run(tmp_path).gold is None
    with pytest.raises(TrainingError, match="has gold scores"):
        write(w, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("key", ["kl", "proxy", "gold", "length"])
def test_non_finite_numbers_are_refused_by_name_and_prompt(tmp_path, key, bad):
    w = writer(tmp_path)
    write(w, 0)
    values = np.ones(PROMPTS)
    values[4] = bad
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(TrainingError, match=rf"step 1: {key} is not finite for prompts \[4\]"):
        write(w, 1, **{key: values})
    assert (tmp_path / FILE_NAME).read_bytes() == before
    write(w, 1)
    assert read_run(tmp_path).step.tolist() == [0, 1]


def test_a_changed_prompt_set_or_a_repeated_step_is_refused(tmp_path):
    w = writer(tmp_path)
    write(w, 5)
    with pytest.raises(TrainingError, match="same 6 prompts"):
        write(w, 6, proxy=np.ones(PROMPTS - 1))
    with pytest.raises(TrainingError, match="proxy is not finite"):
        write(w, 6, proxy=None)
    with pytest.raises(TrainingError, match="already has step 5"):
        write(w, 5)


def test_resume_keeps_records_up_to_the_step_and_drops_later_ones(tmp_path):
    w = writer(tmp_path)
    for step in (0, 10, 20, 30):
        write(w, step)
    started = w.header["started"]
    w = writer(tmp_path, resume_step=15, config={"beta": 1.0})
    assert w.last_step == 10
    write(w, 20, proxy=np.full(PROMPTS, 7.0))
    run = read_run(tmp_path)
    assert run.step.tolist() == [0, 10, 20] and run.proxy[2] == 7.0
    assert run.started == started and run.config == {"beta": 0.0}


def test_resume_with_another_proxy_is_refused(tmp_path):
    write(writer(tmp_path), 0)
    with pytest.raises(ConfigError, match="proxy 'rm0', and this one has 'rm1'"):
        writer(tmp_path, resume_step=0, proxy="rm1")


def test_resume_without_a_file_starts_one_loudly(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        write(writer(tmp_path, resume_step=40), 50)
    assert "does not exist" in caplog.text and read_run(tmp_path).step.tolist() == [50]


def test_a_new_run_keeps_the_old_file(tmp_path, caplog):
    write(writer(tmp_path), 0)
    old = (tmp_path / FILE_NAME).read_bytes()
    for count in (1, 2):
        writer(tmp_path)
        assert len(list(tmp_path.glob("*.old.jsonl"))) == count
    assert (tmp_path / "overoptimization.1.old.jsonl").read_bytes() == old
    assert "kept as overoptimization.1.old.jsonl" in caplog.text


def test_every_cut_of_the_last_line_loses_only_that_line(tmp_path, caplog):
    w = writer(tmp_path)
    for step in (0, 10):
        write(w, step)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    end_of_first = whole.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(end_of_first + 1, len(whole), 37):
        path.write_bytes(whole[:cut])
        caplog.clear()
        assert read_run(path).step.tolist() == [0]
        assert f"{path}: line 3 is incomplete" in caplog.text
    w = writer(tmp_path, resume_step=10)
    assert w.last_step == 0
    write(w, 10)
    caplog.clear()
    assert read_run(path).step.tolist() == [0, 10] and not caplog.text


def test_a_killed_writer_leaves_a_readable_file(tmp_path):
    code = f"""
import os, signal
from align.evaluation.records import EvalWriter
w = EvalWriter({str(tmp_path)!r}, name="a", method="m", proxy="p", gold=None, seed=0, config={{}})
for step in range(1000):
    w.write(step, kl=[0.1], kl_k3=[0.1], proxy=[1.0], length=3)
    if step == 25:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert read_run(tmp_path).step.tolist() == list(range(26))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines.__setitem__(1, lines[1][:40]), "line 2 is not valid JSON"),
        (lambda lines: lines.__setitem__(0, "{}"), "line 1 is not the header"),
        (lambda lines: lines.__setitem__(2, lines[1]), "line 3 has step 0 after step 0"),
        (lambda lines: lines.__setitem__(2, lines[2].replace('"proxy": ', '"proxy": NaN, "old": ', 1)), "NaN is not"),
        (lambda lines: lines.__setitem__(2, "[1, 2]"), "line 3 is not a JSON object"),
        (lambda lines: lines.__setitem__(2, lines[2].replace('"length"', '"len"', 1)), "line 3 lacks length"),
    ],
)
def test_damage_is_an_error_with_its_line(tmp_path, damage, message):
    w = writer(tmp_path)
    for step in (0, 10):
        write(w, step)
    lines = without_checksums(tmp_path / FILE_NAME)
    damage(lines)
    (tmp_path / FILE_NAME).write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)


def test_no_flipped_bit_is_read(tmp_path, caplog):
    w = writer(tmp_path)
    for step in (0, 10):
        write(w, step)
    path, rng = tmp_path / FILE_NAME, random.Random(0)
    content = path.read_bytes()
    for place in rng.sample(range(len(content) - 1), 400):  # the last byte ends the last line
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="line [123]"):
            read_run(path)


def test_lines_without_checksums_are_read_and_get_them(tmp_path):
    w = writer(tmp_path)
    for step in (0, 10):
        write(w, step)
    path = tmp_path / FILE_NAME
    content = path.read_text()
    without_checksums(path)
    assert read_run(path).step.tolist() == [0, 10]
    writer(tmp_path, resume_step=10)
    assert path.read_text() == content


def test_a_resumed_run_knows_what_its_file_has_lost(tmp_path):
    w = writer(tmp_path)
    for step in (0, 10, 20):
        write(w, step)
    path = tmp_path / FILE_NAME
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(DataError, match="lost evaluations .* checkpoint at step 25, the last of them at step 20"):
        writer(tmp_path, resume_step=25, evaluated=20)
    writer(tmp_path, resume_step=5, evaluated=0)
    path.unlink()  # as the error says
    writer(tmp_path, resume_step=25, evaluated=20)
    write(writer(tmp_path, resume_step=25, evaluated=20), 30)  # killed again before its first evaluation
    assert writer(tmp_path, resume_step=30, evaluated=30).last_step == 30
    with pytest.raises(DataError, match="lost evaluations"):
        writer(tmp_path, resume_step=40, evaluated=40)


def test_a_different_number_of_prompts_in_the_file_is_an_error(tmp_path):
    w = writer(tmp_path)
    for step in (0, 10):
        write(w, step)
    lines = without_checksums(tmp_path / FILE_NAME)
    record = json.loads(lines[2])
    record["per_prompt"] = {key: values[:-1] for key, values in record["per_prompt"].items()}
    (tmp_path / FILE_NAME).write_text("\n".join([*lines[:2], json.dumps(record)]) + "\n")
    with pytest.raises(DataError, match="line 3 has different numbers of prompts"):
        read_run(tmp_path)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    writer(tmp_path)
    with pytest.raises(DataError, match="holds no evaluation yet"):
        read_run(tmp_path)


def test_records_needs_no_torch():
    code = "import sys, align.evaluation.records; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("line", "keys", "value", "said"),
    [
        (0, ["name"], ["a"], "name of the header .line 1. is .'a'., no text"),
        (0, ["proxy"], None, "proxy of the header .line 1. is None, no text"),
        (1, ["step"], 10**30, "line 2: step is 1000"),
        (1, ["kl"], 10**400, "line 2: kl is 1000"),
        (1, ["per_prompt", "gold", 0], 10**400, "line 2: gold of per_prompt holds something that is no finite number"),
        (1, ["samples", 0, "proxy"], "high", "line 2: proxy of sample 0 is 'high', no finite number"),
    ],
)
def test_values_of_another_kind_are_named(tmp_path, line, keys, value, said):
    """Of files that other programs write: such values ended inside numpy, or in the report."""
    write(writer(tmp_path), 0)
    lines = [json.loads(text) for text in without_checksums(tmp_path / FILE_NAME)]
    place = lines[line]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / FILE_NAME).write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    with pytest.raises(DataError, match=said):
        read_run(tmp_path)


@pytest.mark.parametrize("key", ["gold", "kl", "rewards/r"])
def test_a_mean_that_its_numbers_do_not_have_is_named(tmp_path, key):
    """Of files without checksums: the figure showed the one, its band the other."""
    writer(tmp_path).write(0, kl=[0.1, 0.3], kl_k3=[0, 0], proxy=[1, 2], gold=[1, 2], length=3, **{"rewards/r": [1, 2]})
    lines = [json.loads(text) for text in without_checksums(tmp_path / FILE_NAME)]
    rounded = dict(lines[1], kl=0.2001)  # of a program that writes few digits
    for record, said in (
        (rounded, None),
        (dict(lines[1], **{key: 4}), f"line 2: {key} is 4, and its numbers per prompt"),
    ):
        (tmp_path / FILE_NAME).write_text(json.dumps(lines[0]) + "\n" + json.dumps(record) + "\n")
        if said is None:
            assert read_run(tmp_path).kl == [0.2001]
            continue
        with pytest.raises(DataError, match=said):
            read_run(tmp_path)
