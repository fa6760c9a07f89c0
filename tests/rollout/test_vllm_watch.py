"""Who does not come where processes share an engine is named, and the process that waits for it ends."""

import pytest

from align.rollout.vllm_watch import Heard, Place, told
from tests.rollout.rollout_models import needs_vllm
from tests.warm import run_ranks

OWN = Place(7, "completions", inside=True)


@pytest.mark.parametrize(
    "heard, silent, missing, said",
    [
        (None, True, True, "did not come: it has not begun to make this engine, or ended as it did"),
        (Place(), False, True, "did not come, and is busy with something else (its last: no step)"),
        (
            *(Place(6, "the proof of weights"), False, True),
            "did not come, and is busy with something else (its last: step 6, the proof of weights)",
        ),
        (
            *(Place(7, "completions", True), True, True),
            "gives no sign of life: it is stopped, or has ended (its last known: step 7, completions)",
        ),
        (Place(7, "completions", True), False, False, "came, and waits too, or does not get on"),
        (Place(7, "completions", False), False, True, "came, and has left the step, as after an error"),
        (Place(8, "completions", True), False, True, "came, and has left the step, as after an error"),
    ],
)
def test_what_is_told_of_a_process(heard, silent, missing, said):
    assert told(3, heard and Heard(1, heard, 0.0), OWN, silent) == (missing, f"process 3 {said}")


@needs_vllm
@pytest.mark.vllm
def test_a_stopped_process_ends_the_other_also_where_it_keeps_the_store(tmp_path):
    """In a collective of vLLM's that has no limit, and a store that never answers."""
    with pytest.raises(AssertionError, match=r"watch_ranks ended with \[-9, 2\]") as error:
        run_ranks("tests.rollout.watch_ranks", logs=tmp_path)
    said = (tmp_path / "rank1.txt").read_text()
    assert "align: error: processes 0, 1 share a vLLM engine, and process 1 waited for 3." in said, error
    assert "seconds (limit: 3, by ddp_timeout) in step 7, completions: process 0 of the run, by which they " in said
    assert "cpu_communicator.py" in said  # where it waited
