"""What the commands print of messages and warnings."""

import logging
import warnings

import pytest

from align.cli import terminal


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    logger = logging.getLogger("align")
    before, level = logger.handlers[:], logger.level
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
    logger.handlers[:] = before
    logger.setLevel(level)
    for name in terminal.OF_ONE_PROCESS:
        logging.getLogger(name).setLevel(logging.NOTSET)


def say(capsys) -> list[str]:
    terminal.set_up_logging()
    for _ in range(2):
        logging.getLogger("align.x").info("step")
        logging.getLogger("align.x").warning("careful")
        logging.getLogger("align.x").error("wrong")
        logging.getLogger(terminal.OF_ONE_PROCESS[0]).warning("row 7 failed")
    with terminal.each_warning_once():
        for _ in range(2):
            warnings.resetwarnings()  # as libraries do, which lets the same warning through again
            warnings.warn("old", UserWarning, stacklevel=1)
    return [line for line in capsys.readouterr().err.splitlines() if "warnings.warn" not in line]


def test_a_warning_is_shown_once(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"shown: {message}", file=__import__("sys").stderr)
        found = say(capsys)
    assert sorted(found) == sorted(
        ["INFO align.x: step"] * 2
        + ["ERROR align.x: wrong"] * 2
        + ["WARNING align.x: careful", f"WARNING {terminal.OF_ONE_PROCESS[0]}: row 7 failed", "shown: old"]
    )


def test_other_processes_say_what_they_alone_have_seen(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: pytest.fail(f"shown: {message}")
        found = say(capsys)
    assert sorted(found) == sorted(
        ["ERROR align.x: wrong"] * 2 + [f"WARNING {terminal.OF_ONE_PROCESS[0]}: row 7 failed"]
    )


def test_libraries_repeat_no_warning(caplog):
    handlers = {h for name in terminal.LIBRARIES for h in logging.getLogger(name).handlers} | {logging.lastResort}
    before = {handler: handler.filters[:] for handler in handlers}
    for handler in handlers:
        handler.filters.clear()  # of commands that other tests ran
    terminal.quieten_libraries()
    terminal.quieten_libraries()  # a second run in the same process adds nothing
    (once,) = [f for f in logging.getLogger("transformers").handlers[0].filters if isinstance(f, terminal.Once)]
    assert not any(isinstance(f, terminal.Once) for f in caplog.handler.filters)
    record = logging.LogRecord("transformers.x", logging.WARNING, "", 1, "the flag %s", ("use_cache",), None)
    assert once.filter(record) and not once.filter(record)
    for handler in handlers:
        handler.filters[:] = before[handler]
