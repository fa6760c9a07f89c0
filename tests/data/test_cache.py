"""Tokenised rows on disk: the same as in memory, made once, never out of date, made again when damaged."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import resource
import time
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from align.data import BadRows, fingerprint, load_rows, passes, tokenize_completions, tokenize_pairs, tokenize_prompts
from align.data import cache as cache_module
from align.data.cache import cached, root
from align.data.fingerprint import tokenizer_digest
from align.errors import DataError

ROWS = [
    {"prompt": f"Human: {i}\n\nAssistant:", "chosen": " yes" * (1 + i % 5), "rejected": " no", "weight": i / 7}
    for i in range(40)
]
ROWS[3]["chosen"], ROWS[31]["rejected"], ROWS[7]["rejected"] = "", None, " a<eos>b"
LIMIT = 24  # cuts some of the completions


@pytest.fixture
def on_disk(monkeypatch):
    """As if 40 rows were many."""
    monkeypatch.setattr(passes, "IN_MEMORY", 10)


def pairs(tokenizer, rows=ROWS, **options):
    report = BadRows()
    options = {"max_length": LIMIT, "max_bad_share": 0.1, **options}
    return tokenize_pairs(Dataset.from_list(rows), tokenizer, report=report, **options), report


def sets():
    return sorted(path.name for path in root().iterdir() if path.suffix != ".lock") if root().exists() else []


def test_on_disk_as_in_memory_with_any_number_of_processes(make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(bos=True)
    expected, said = pairs(tokenizer)
    assert not sets() and said.bad == 2 and len(said.notes) == 2
    monkeypatch.setattr(passes, "IN_MEMORY", 10)
    for processes in (1, 2):
        cache_module.shutil.rmtree(root(), ignore_errors=True)
        rows, report = pairs(tokenizer, num_proc=processes)
        assert rows.to_list() == expected.to_list() and rows.features == expected.features
        assert (report.reasons, report.notes, report.total) == (said.reasons, said.notes, said.total)
        assert rows.cache_files and len(sets()) == 1, "the rows are not memory-mapped"


def test_a_second_start_tokenises_nothing_and_says_the_same(make_tokenizer, on_disk, monkeypatch):
    tokenizer = make_tokenizer(bos=True)
    first, said = pairs(tokenizer)
    monkeypatch.setattr(passes.Recipe, "batch", lambda *_: pytest.fail("tokenised again"))
    again, report = pairs(make_tokenizer(bos=True))
    assert again.to_list() == first.to_list() and report == said
    with pytest.raises(DataError, match=r"chosen is empty: 1 \(row 3\); rejected is missing: 1 \(row 31\)"):
        pairs(tokenizer, max_bad_share=0.0)


def test_what_changes_the_tokens_changes_the_set(make_tokenizer, on_disk):
    tokenizer = make_tokenizer(bos=True)
    pairs(tokenizer)
    made = 1

    def is_another(**options):
        nonlocal made
        rows, _ = pairs(**{"tokenizer": tokenizer, **options})
        made += 1
        assert len(sets()) == made, options.keys()
        return rows

    assert is_another(rows=[{**ROWS[0], "chosen": " sun"}, *ROWS[1:]])[0]["chosen"] == " sun"
    is_another(max_length=LIMIT + 1)
    is_another(tokenizer=make_tokenizer())
    tokenizer.add_tokens(["Human"])
    is_another()
    tokenize_prompts(Dataset.from_list(ROWS).remove_columns("rejected"), tokenizer, max_prompt_length=LIMIT)
    assert len(sets()) == made + 1
    tokenize_completions(Dataset.from_list(ROWS), tokenizer, max_length=LIMIT, max_bad_share=0.1)
    assert len(sets()) == made + 2


def test_the_tokenizer_counts_by_content(chat_tokenizer, make_tokenizer, monkeypatch):
    digest = tokenizer_digest(chat_tokenizer)
    chat_tokenizer("some text", padding="max_length", max_length=9, truncation=True)
    assert tokenizer_digest(chat_tokenizer) == digest, "the settings of a call count"
    chat_tokenizer.chat_template += "{# changed #}"
    assert tokenizer_digest(chat_tokenizer) != digest
    chat_tokenizer.chat_template += "{{ strftime_now('%d') }}"
    digest = tokenizer_digest(chat_tokenizer)

    class Tomorrow:
        @staticmethod
        def today():
            return "tomorrow"

    monkeypatch.setattr("align.data.today.date", Tomorrow)
    assert tokenizer_digest(chat_tokenizer) != digest


def test_damaged_sets_are_made_again(tokenizer, on_disk, caplog):
    expected = pairs(tokenizer)[0].to_list()
    (name,) = sets()
    folder = root() / name
    (rows,) = folder.glob("*.arrow")
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    for damage in (
        lambda: rows.write_bytes(content),
        lambda: rows.write_bytes(rows.read_bytes()[:1000]),
        rows.unlink,
        lambda: (folder / "made.json").write_text("{"),
        lambda: (folder / "made.json").write_text("null"),
        lambda: (folder / "made.json").write_text('{"files": {}, "reasons": {}, "notes": {}}'),
        (folder / "made.json").unlink,
    ):
        damage()
        assert pairs(tokenizer)[0].to_list() == expected
        assert sets() == [name]
    assert caplog.text.count("were damaged: they are made again") == 7


def test_without_caching_nothing_is_kept(tokenizer, on_disk):
    datasets.disable_caching()
    try:
        assert len(pairs(tokenizer, num_proc=2)[0]) == 38
    finally:
        datasets.enable_caching()
    assert not sets()


def slow_make(folder, report, dies=False):
    with (root() / "makers").open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.5)
    if dies:
        os._exit(1)
    report.note(4, "noted")
    data = Dataset.from_dict({"a": [1, 2]})
    return data.map(lambda row: row, cache_file_name=str(folder / "rows.arrow"), new_fingerprint="x")


def ask(queue, make):
    report = BadRows()
    queue.put((cached("key", make, report)["a"][:], report.notes))


def test_one_process_makes_a_set_and_the_others_wait_even_where_the_first_dies(tmp_path):
    root().mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    dying = fork.Process(target=cached, args=("key", lambda *args: slow_make(*args, dies=True), BadRows()))
    dying.start()
    while not (root() / "makers").exists():
        time.sleep(0.02)
    others = [fork.Process(target=ask, args=(queue, slow_make)) for _ in range(3)]
    for process in others:
        process.start()
    assert [queue.get(timeout=20) for _ in others] == [([1, 2], {"noted": [4]})] * 3
    for process in (dying, *others):
        process.join()
    assert len((root() / "makers").read_text().split()) == 2  # the one that died, and one after it
    assert sets() == ["key", "makers"], "what the dead process left is still there"


def test_waiting_ends_with_a_sentence(monkeypatch):
    monkeypatch.setattr(cache_module, "PATIENCE", 0.3)
    root().mkdir(parents=True)
    with (root() / "key.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is to write tokenised rows to .*key and has written"):
            cached("key", slow_make, BadRows())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be written in .*file.*disable_caching"):
        cached("key", slow_make, BadRows())


@pytest.fixture
def full_disk():
    """No file may have more than a page, which the system says as it says that a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("caching", [True, False])
def test_a_disk_that_is_full_while_rows_are_tokenised_is_named(caching, tokenizer, on_disk, full_disk):
    rows = Dataset.from_list([{"prompt": "a cat", "completion": "a dog " * 9}] * 2000)
    (datasets.enable_caching if caching else datasets.disable_caching)()
    advice = "HF_DATASETS_CACHE" if caching else "TMPDIR"
    try:
        with pytest.raises(
            DataError, match=f"tokenised rows cannot be written in .*: .*{advice} to a folder with room"
        ):
            tokenize_completions(rows, tokenizer, max_length=64)
    finally:
        datasets.enable_caching()


def test_a_full_disk_is_known_behind_another_error():
    def make(folder, report):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:  # as the writer of Arrow files
            raise ValueError("I/O operation on closed file")

    with pytest.raises(DataError, match="tokenised rows cannot be written in .*: No space left"):
        cached("key", make, BadRows())


def test_a_disk_that_is_full_while_rows_are_read_is_named(tmp_path, request):
    """And not the data, which was said to be unreadable."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"cat {i}", "completion": "dog"}) + "\n" for i in range(2000)))
    request.getfixturevalue("full_disk")
    with pytest.raises(DataError, match=f"the rows of .*jsonl cannot be written in {root().parent}: .*DATASETS_CACHE"):
        load_rows(path)


def test_a_file_rewritten_with_its_old_time_gives_the_new_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text in ("one", "two"):
        path.write_text(json.dumps({"prompt": text}) + "\n")
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert load_rows(path).to_list() == [{"prompt": text}]


def test_a_set_is_made_anew_when_code_that_makes_ids_changes():
    folder = Path(fingerprint.__file__).parent
    used = {
        m
        for name in fingerprint.CODE
        for m in re.findall(r"from align\.data\.(\w+) ", (folder / f"{name}.py").read_text())
    }
    assert used - {*fingerprint.CODE} <= {
        "beside",
        "cache",
        "collate",
        "dialogue",
        "fingerprint",
        "limits",
        "rows",
        "streams",
    }  # which make none
    assert {"messages", "turns"} <= {*fingerprint.CODE}
