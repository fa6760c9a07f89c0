"""When one of three or four processes is killed the others end, and the newest whole checkpoint is the one before."""

import pytest
import torch

from align.distributed.checkpoints import newest_whole
from tests.trainers.core.killed_ranks import CASES, LIMIT
from tests.warm import run_ranks


@pytest.mark.parametrize("case", CASES)
def test_the_others_end_and_a_whole_checkpoint_is_left(case, policy, tmp_path):
    _, _, killed, count, step = CASES[case]
    module = "tests.trainers.core.killed_ranks"
    run_ranks(module, policy, str(tmp_path), case, logs=tmp_path, count=count, killed=killed)
    for rank in {*range(count)} - {killed}:
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found["said"] != "trained" and found["seconds"] < 2 * LIMIT, found
    assert newest_whole(tmp_path / "run").name == f"checkpoint-{step}"
