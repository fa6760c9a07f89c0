"""Human:/Assistant: text: what is converted, what is left out, and the warning where a chat model is trained on it."""

import errno
import json
import logging
import re
import shlex
from pathlib import Path

import pytest
from datasets import Dataset

from align.cli.main import main
from align.data import load_rows, tokenize_pairs
from align.data.dialogue import convert_dialogues, messages_of
from align.errors import DataError
from tests.reward_models import worlds

TALK = "\n\nHuman: w1 w2?\n\nAssistant: w3\nw4\n\nHuman: w5\n\nAssistant:"
MESSAGES = [
    {"role": "user", "content": "w1 w2?"},
    {"role": "assistant", "content": "w3\nw4"},
    {"role": "user", "content": "w5"},
]


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def converted(row: dict, **options) -> dict:
    return convert_dialogues(Dataset.from_list([row]), **options)[0][0]


def test_every_format():
    assert messages_of(TALK) == [*MESSAGES, *said("")]
    script = "w3\nUser: w4\nBot: w5"
    assert messages_of(f"Human: w1\n\nAssistant: {script}") == [{"role": "user", "content": "w1"}, *said(script)]
    assert messages_of("In this play\n\nHuman: w1") is None and messages_of("Assistant: w1") is None
    system = {"role": "system", "content": "w9"}
    pair = {"chosen": said("w6"), "rejected": said("w7")}
    assert converted({"prompt": TALK, "chosen": " w6", "rejected": " w7", "topic": 3}) == {
        "prompt": MESSAGES,
        **pair,
        "topic": 3,
    }
    assert converted({"chosen": TALK + " w6", "rejected": TALK + " w7"}, system="w9") == {
        name: [system, *MESSAGES, *answer] for name, answer in pair.items()
    }
    assert converted({"prompt": TALK[:-12], "completion": "Assistant: w6"}) == {
        "prompt": MESSAGES,
        "completion": said("w6"),
    }
    assert converted({"text": TALK + " w6"}) == {"messages": [*MESSAGES, *said("w6")]}
    assert converted({"prompt": TALK}) == {"prompt": MESSAGES}


def test_what_is_no_dialogue_is_left_out_by_number():
    good = {"prompt": TALK, "completion": " w6"}
    rows = [
        good,
        {**good, "completion": " w6\n\nHuman: w7"},
        {**good, "prompt": "w1"},
        {**good, "prompt": TALK + " w8"},
    ]
    with pytest.raises(DataError, match="3 of 4 rows cannot be used") as error:
        convert_dialogues(Dataset.from_list(rows))
    for reason in (
        "further turns after the answer: 1 (row 1)",
        "turn of Human: or User: (`--plain` takes texts as they are): 1 (row 2)",
        "turn: 1 (row 3)",
    ):
        assert reason in str(error.value)
    kept, report = convert_dialogues(Dataset.from_list(rows), max_bad_share=0.75)
    assert len(kept) == 1 and report.bad == 3
    assert kept.cache_files  # on the disk: memory does not grow with the rows
    with pytest.raises(DataError, match="holds messages already"):
        convert_dialogues(Dataset.from_list([{"messages": MESSAGES + said("w6")}]))


def test_a_chat_model_is_warned_once_and_the_command_helps(tmp_path, caplog, capsys):
    source = tmp_path / "pairs.jsonl"
    row = {"prompt": TALK, "chosen": " w6", "rejected": " w7"}
    source.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    caplog.set_level(logging.WARNING, logger="align")
    logging.getLogger("align").propagate = True
    rows, tokenizer = load_rows(source), worlds.tokenizer()
    for _ in range(2):
        tokenize_pairs(rows, tokenizer, max_length=None)
    told = [record.message for record in caplog.records if "which is not used for plain text" in record.message]
    assert len(told) == 1 and f"`align data convert {source} --to FILE.jsonl`" in told[0]
    tokenize_pairs(rows, worlds.tokenizer(template=None), max_length=None)
    plain = Dataset.from_list([{"prompt": "w1 ", "chosen": "w6", "rejected": "w7"}])
    tokenize_pairs(plain, worlds.tokenizer(), max_length=None)
    assert sum("not used for plain text" in record.message for record in caplog.records) == 1
    target = tmp_path / "talks.jsonl"
    assert main(["data", "convert", str(source), "--to", str(target)]) == 0
    assert f"wrote 3 of 3 rows to {target}" in capsys.readouterr().out
    asked = tokenize_pairs(load_rows(target), tokenizer, max_length=None)[0]
    assert tokenizer.decode(asked["prompt_ids"]) == "U: <unk> <unk> A: w3 w4 </s> U: w5 A:".replace(
        "<unk> <unk>", "w1 <unk>"
    )
    assert tokenizer.decode(asked["chosen_ids"]) == "w6 </s>"
    assert main(["data", "convert", str(source), "--to", str(target)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_command_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Dataset.from_list([{"prompt": TALK, "chosen": " w6", "rejected": " w7"}]).to_parquet("hh_pairs.parquet")
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    export = {"question": "w1?", "answer_good": "w6", "answer_bad": "w7"}
    Dataset.from_list([export]).to_csv("export.csv")
    Dataset.from_list([{"question": "w1", "answer": "w2", "thumb": thumb} for thumb in ("up", "down")]).to_json(
        "thumbs.jsonl"
    )
    dialogues, columns = re.findall(r"```bash\n(align data convert .*)\n", page)
    assert main(shlex.split(dialogues)[1:]) == 0
    assert load_rows("pairs.jsonl")[0]["prompt"][0]["content"] == "You are a helpful assistant."
    Path("pairs.jsonl").unlink()
    assert main(shlex.split(columns)[1:]) == 0
    assert load_rows("pairs.jsonl")[0]["chosen"] == said("w6")
    (thumbs,) = re.findall(r'```python\n(rows = load_rows\("thumbs.*?)```', page, re.DOTALL)
    exec(thumbs, {"load_rows": load_rows})
    assert load_rows("labelled.jsonl")["label"] == [True, False]
    assert {"prompt", "completion"} <= set(load_rows("labelled.jsonl").column_names)


def test_columns_of_other_names_and_plain_answers(tmp_path, capsys):
    """A table exported from elsewhere, which holds no messages."""
    source, target = tmp_path / "export.csv", tmp_path / "pairs.jsonl"
    source.write_text('question,good,bad,rating\n"w1, w2?",w6,w7,0.5\nw3," ",w7,1\n')
    command = ["data", "convert", str(source), "--to", str(target), "--plain", "--max_bad_share", "0.5", "--rename"]
    names = ["question=prompt", "good=chosen", "bad=rejected"]
    assert main([*command, *names]) == 0
    (row,) = load_rows(target)
    asked = [{"role": "user", "content": "w1, w2?"}]
    assert row == {"prompt": asked, "chosen": said("w6"), "rejected": said("w7"), "rating": 0.5}
    target.unlink()
    for words, message in (
        (["qestion=prompt"], "--rename qestion=prompt: write OLD=NEW; the columns are question, good, bad, rating"),
        (["question"], "--rename question=: write OLD=NEW"),
        (["question=rating"], "--rename question=rating: there would be two columns rating"),
        (["good=chosen", "bad=rejected"], "without 'prompt', and a column 'question' that is not in them: rename it"),
    ):
        assert main([*command, *words]) == 2
        assert message in capsys.readouterr().err


def test_plain_text_for_a_chat_model_is_said(tmp_path, capsys):
    source = tmp_path / "pairs.jsonl"
    source.write_text(json.dumps({"prompt": "w1 ", "chosen": "w6", "rejected": "w7"}) + "\n")
    for template, told in ((worlds.TEMPLATE, 1), (None, 0)):
        worlds.tokenizer(template=template).save_pretrained(tmp_path / str(told))
        assert main(["data", "show", str(source), "--tokenizer", str(tmp_path / str(told))]) == 0
        assert capsys.readouterr().out.count("note: plain text: the model's chat template is not used") == told


def test_published_pairs(real_pairs):
    rows = load_rows(real_pairs)
    kept, report = convert_dialogues(rows, max_bad_share=0.05)
    assert len(kept) + report.bad == len(rows) == 2000
    assert report.bad == 32  # as docs/data.md says
    first_bad = min(row for numbers in report.reasons.values() for row in numbers)
    assert first_bad > 50
    for row, before in zip(kept.select(range(first_bad)), rows, strict=False):
        assert row["prompt"][-1]["role"] == "user" and row["chosen"][0]["content"] == before["chosen"].strip()
        assert before["prompt"].count("\n\nHuman:") == sum(m["role"] == "user" for m in row["prompt"])


def test_several_answers_with_scores(tmp_path):
    """Their prompts became messages and they stayed text, which no format is."""
    for plain in (False, True):
        prompt = "w1" if plain else "Human: w1\n\nAssistant:"
        rows = Dataset.from_list([{"prompt": prompt, "completions": ["w6", "w7"], "scores": [0.5, 1.0]}])
        (row,) = convert_dialogues(rows, plain=plain)[0]
        assert row["prompt"] == [{"role": "user", "content": "w1"}]
        assert (row["completions"], row["scores"]) == ([said("w6"), said("w7")], [0.5, 1.0])


def test_plain_texts_stay_as_they_are():
    """White space around them was taken off: the indentation of code."""
    rows = Dataset.from_list([{"prompt": "def f():\n", "completion": "    return 1\n"}])
    (row,) = convert_dialogues(rows, plain=True)[0]
    assert (row["prompt"][0]["content"], row["completion"][0]["content"]) == ("def f():\n", "    return 1\n")


def test_renamed_cells_that_look_like_numbers_are_texts(tmp_path):
    source, target = tmp_path / "export.csv", tmp_path / "pairs.jsonl"
    source.write_text("question,answer,strength\nw1,42,1\nw2,1.50,2\n")
    command = ["data", "convert", str(source), "--to", str(target), "--plain", "--rename"]
    assert main([*command, "question=prompt", "answer=completion", "strength=margin"]) == 0
    rows = load_rows(target)
    assert [row["completion"] for row in rows] == [said("42"), said("1.50")] and rows["margin"] == [1, 2]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_conversion_that_breaks_off_leaves_no_part(tmp_path, monkeypatch, capsys, suffix):
    """It left a file with the first rows, which trained as a smaller set."""

    def full(self, path, **options):
        Path(path).write_text("a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    source, target = tmp_path / "rows.jsonl", tmp_path / f"made{suffix}"
    source.write_text(json.dumps({"prompt": "w1", "completion": "w2"}) + "\n")
    monkeypatch.setattr(Dataset, "to_json", full)
    monkeypatch.setattr(Dataset, "to_parquet", full)
    assert main(["data", "convert", str(source), "--to", str(target), "--plain"]) == 2
    assert f"{target} cannot be written: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]
    assert main(["data", "convert", str(source), "--to", str(source / "x.jsonl"), "--plain"]) == 2
    assert "cannot be written: File exists" in capsys.readouterr().err
