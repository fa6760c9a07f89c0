"""`align data`: its numbers against the tokenisation that it reports on."""

import json
import random
import re
from pathlib import Path

import pytest
from datasets import Dataset

from align.cli.main import main
from align.data import BadRows, load_rows, toy
from align.data.formats import detect_format
from align.data.tokenize import tokenize_completions, tokenize_pairs, tokenize_prompts
from align.data.unpaired import tokenize_unpaired
from align.errors import DataError
from align.evaluation.data_repeats import digests_of, leakage, repeats
from align.evaluation.data_report import data_report, lines

WORDS = [*toy.POLITE, *toy.FILLER, *toy.TOPIC_OF]


def made(count: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = []
    for _ in range(count):
        start = text(1, 6)
        rows.append({"prompt": text(1, 12), "chosen": f"{start} a {text(1, 9)}", "rejected": f"{start} b {text(1, 9)}"})
    return Dataset.from_list(rows)


def labelled(pairs: Dataset) -> Dataset:
    return pairs.map(
        lambda row, i: {"completion": row["chosen"], "label": i % 3 == 0}, with_indices=True
    ).select_columns(["prompt", "completion", "label"])


@pytest.mark.parametrize("use", ["pairs", "completions", "prompts", "unpaired"])
def test_what_limits_cost_is_what_they_do(use):
    rows, tokenizer = made(60), toy.tokenizer()
    rows = labelled(rows) if use == "unpaired" else rows
    tokenize = {
        **{"pairs": tokenize_pairs, "completions": tokenize_completions, "prompts": tokenize_prompts},
        "unpaired": tokenize_unpaired,
    }[use]
    name = "max_prompt_length" if use == "prompts" else "max_length"
    limits = [4, 8, 13, 20, 40]
    found = data_report(rows, tokenizer, use=use, limits=limits)
    assert sum(count for *_, count in found["histogram"]) == found["usable"] == 60
    for limit in limits:
        report = BadRows()
        try:
            tokenize(rows, tokenizer, **{name: limit}, max_bad_share=1.0, report=report)
        except DataError:
            assert report.bad == 60
        cut = {row for text, at in report.notes.items() if "cut" in text for row in at}
        bad = {row for at in report.reasons.values() for row in at}
        assert found["limits"][limit] == {"dropped": report.bad, "cut": len(cut - bad)}, limit


def test_faults_repeats_and_leakage(tmp_path):
    rows = made(10).to_list()
    rows += [rows[2], {**rows[3], "rejected": "other"}, {**rows[4], "chosen": ""}]
    other = [rows[2], {**rows[5], "chosen": "new"}, *made(3, seed=9).to_list()]
    found = data_report(Dataset.from_list(rows), toy.tokenizer(), against=Dataset.from_list(other))
    assert found["dropped"] == {"chosen is empty": (1, [12])} and found["usable"] == 12
    assert found["repeats"] == {"rows": 1, "prompts": 3}  # of all rows, the one that is dropped too
    assert found["leakage"] == {"of": 5, "rows": 1, "prompts": 2}
    assert "dropped: chosen is empty: 1 (row 12)" in lines(found)


def test_a_sample_says_that_it_is_one(tmp_path):
    """Rows have their numbers in the whole; what repeats is counted over all rows."""
    rows = made(400).to_list()
    rows = [*rows, {**rows[5], "chosen": ""}, rows[7]]
    data = Dataset.from_list(rows).add_column("row", [f"mine {i}" for i in range(len(rows))])
    found = data_report(data, toy.tokenizer(), sample=50, examples=50)
    numbers = [int(re.match(r"row (\d+):", example).group(1)) for example in found["examples"]]
    assert found["usable"] == len(numbers) == 49 and numbers == sorted(numbers) and 300 < numbers[-1] < 400
    assert found["dropped"] == {"chosen is empty": (1, [400])}
    assert rows[numbers[9]]["chosen"].strip() in found["examples"][9]
    repeated = len(rows) - len({row["prompt"] for row in rows})
    assert found["repeats"] == {"rows": 1, "prompts": repeated} and found["columns"][-1] == "row"
    assert "402 rows, of which a sample of 50 was checked and tokenised: 49 usable as pairs" in lines(found)[0]
    again = data_report(data, toy.tokenizer(), sample=50, examples=50)
    assert again["examples"] == found["examples"]
    whole = data_report(data, toy.tokenizer(), sample=402)
    assert whole["usable"] == 401 and "402 rows, 401 usable as pairs" in lines(whole)[0]


def test_repeats_of_conversations(tmp_path):
    """Keys that only some messages have, and other names of roles, make no other row; the prompt is what stands before
    the first answer, or what both answers begin with."""

    def talk(*texts, **more):
        return [
            {"role": role, "content": text, **more} for role, text in zip(["user", "assistant"], texts, strict=False)
        ]

    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    demonstrations = Dataset.from_list([{"messages": m} for m in (talk("a", "b"), talk("a", "c", name="x"))])
    sharegpt = Dataset.from_list([{"conversations": shared}])
    rows, other = (digests_of(data, "completions", detect_format(data)) for data in (demonstrations, sharegpt))
    assert repeats(rows) == {"rows": 0, "prompts": 0}  # a name is another message
    assert leakage(rows, other) == {"of": 1, "rows": 1, "prompts": 1}
    pairs = Dataset.from_list(
        [{"chosen": talk("a", "b"), "rejected": talk("a", "c")}, {"chosen": talk("a", "d"), "rejected": talk("a", "e")}]
    )
    explicit = Dataset.from_list([{"prompt": talk("a"), "chosen": talk("a", "b")[1:], "rejected": talk("a", "z")[1:]}])
    rows = digests_of(pairs, "pairs", detect_format(pairs))
    assert repeats(rows) == {"rows": 0, "prompts": 1}
    assert leakage(rows, digests_of(explicit, "pairs", detect_format(explicit))) == {"of": 1, "rows": 0, "prompts": 1}


def test_labelled_answers():
    rows = labelled(made(9)).to_list()
    rows += [rows[0], {**rows[1], "label": True}, {**rows[2], "label": None}]  # another label is another row
    found = data_report(Dataset.from_list(rows), toy.tokenizer(), against=labelled(made(4)))
    assert found["use"] == "unpaired" and found["dropped"] == {"label is missing": (1, [11])}
    assert "11 usable as unpaired (prompt_completion, text; 5 desirable, 6 undesirable)" in lines(found)[0]
    assert found["repeats"] == {"rows": 1, "prompts": 3} and found["leakage"] == {"of": 4, "rows": 4, "prompts": 4}
    assert "1 trained" not in found["examples"][0] and "desirable" in found["examples"][0]
    pairs = data_report(made(5), toy.tokenizer(), use="unpaired")
    assert pairs["usable"] == 10 and "(preference, text; 5 desirable, 5 undesirable)" in lines(pairs)[0]


def test_the_command_of_the_documentation(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    command = re.search(r"^align (data show .*)$", page, re.MULTILINE).group(1).split()
    monkeypatch.chdir(tmp_path)
    Path("my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made(30)))
    toy.tokenizer().save_pretrained("my-model")
    assert main([*command, "--against", "my_pairs.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "my_pairs.jsonl: 30 rows, 30 usable as pairs (preference, text)" in shown
    assert "leakage: of 30 rows of the other split 30 are here, 30 by their prompt" in shown
    assert "trained | " in shown and "row 1: " in shown
    html = Path("outputs/my_pairs.html").read_text()
    found = data_report(load_rows("my_pairs.jsonl"), toy.tokenizer(), limits=[16, 48])
    assert f'<td>16</td><td class="r">{found["limits"][16]["dropped"]}</td>' in html and "trained |" in html


def test_a_file_of_no_known_format_is_named(tmp_path, capsys):
    (tmp_path / "scores.jsonl").write_text('{"a": 1}\n')
    toy.tokenizer().save_pretrained(tmp_path / "m")
    for use in ([], ["--use", "pairs"]):
        assert main(["data", "show", str(tmp_path / "scores.jsonl"), "--tokenizer", str(tmp_path / "m"), *use]) == 2
        assert f"{tmp_path / 'scores.jsonl'} has no " in capsys.readouterr().err
