"""Phases in processes of their own: their order, and what ends them."""

import os
import time

import pytest
from rich.console import Console

from align.errors import AlignError, DataError
from align.quickstart.progress import PhaseProgress
from align.quickstart.workers import Phase, run_phases
from align.quickstart.workspace import Workspace


def wait_for(other, space, seconds, handle):
    """Ends when the phase `other` runs, too."""
    space.path(f"seen_{os.getpid()}").touch()
    deadline = time.monotonic() + seconds
    while len(list(space.folder.glob("seen_*"))) < 2:
        assert time.monotonic() < deadline, f"{other} did not begin"
        time.sleep(0.05)
    handle.update(0.5)
    return {"process": os.getpid()}


def wait_for_second(*arguments):
    return wait_for("second", *arguments)


def wait_for_first(*arguments):
    return wait_for("first", *arguments)


def after_both(space, seconds, handle):
    print("printed by the third")
    return {"seen": len(list(space.folder.glob("seen_*")))}


def bad_rows(space, seconds, handle):
    raise DataError("row 3 is empty")


def ends_itself(space, seconds, handle):
    os._exit(9)


def sleeps(space, seconds, handle):
    time.sleep(seconds)
    return {}


def nothing(backend: str) -> None:
    """In place of the libraries, which these phases do not use."""


@pytest.fixture(autouse=True)
def without_libraries(monkeypatch):
    monkeypatch.setattr("align.quickstart.workers._load_libraries", nothing)


def run(folder, plan: dict[str, Phase], seconds: float = 60.0) -> Workspace:
    space = Workspace(folder, {"seed": 0})
    with (
        (folder / "out").open("w") as out,
        PhaseProgress({name: 1.0 for name in plan}, Console(file=out)) as progress,
    ):
        run_phases(plan, space, (seconds,), progress, folder / "log")
    return space


def test_phases_that_do_not_need_each_other_run_side_by_side_and_others_wait(tmp_path):
    space = run(
        tmp_path,
        {
            "third": Phase(after_both, ("first", "second"), 1.0),
            "first": Phase(wait_for_second, (), 1.0),
            "second": Phase(wait_for_first, (), 1.0),
        },
    )
    results = {name: phase["result"] for name, phase in space.state["phases"].items()}
    assert results["third"] == {"seen": 2}
    assert os.getpid() != results["first"]["process"] != results["second"]["process"] != os.getpid()
    assert "printed by the third" in (tmp_path / "log").read_text()
    again = run(tmp_path, {name: Phase(ends_itself, (), 1.0) for name in results})
    assert again.state == space.state
    assert "first: finished earlier, kept" in (tmp_path / "out").read_text()


def test_an_error_in_one_phase_is_raised_and_ends_the_others(tmp_path):
    start = time.monotonic()
    plan = {"slow": Phase(sleeps, (), 1.0), "bad": Phase(bad_rows, (), 1.0), "never": Phase(sleeps, ("bad",), 1.0)}
    with pytest.raises(DataError, match="row 3 is empty"):
        run(tmp_path, plan, 600.0)
    assert time.monotonic() - start < 120
    assert Workspace(tmp_path, {"seed": 0}).state["phases"] == {}


def test_a_process_that_ends_by_itself_is_named(tmp_path):
    with pytest.raises(AlignError, match="the process of gone .*log"):
        run(tmp_path, {"gone": Phase(ends_itself, (), 1.0)})
