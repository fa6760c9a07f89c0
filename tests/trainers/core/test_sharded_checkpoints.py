"""FSDP2 with SHARDED_STATE_DICT, accelerate's default: checkpoints are shards, what is saved at the end is whole."""

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.core.sharded_ranks import CASES, ROUNDING
from tests.trainers.core.test_saved import make
from tests.trainers.tiny_runs import assert_same
from tests.trainers.two_processes import run_on_two


@pytest.fixture(scope="module")
def runs(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_on_two("tests.trainers.core.sharded_ranks", folder, policy)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_saved_model_is_whole(runs, case, policy, tmp_path):
    """No folder was written, and nothing was said."""
    folder, checkpoints = runs
    assert any("fsdp" in name for name in checkpoints[case])
    file = "adapter_model.safetensors" if CASES[case] else "model.safetensors"
    whole, resumed = (load_file(folder / f"{case} {name}" / file) for name in ("whole", "resumed"))
    assert_same(resumed, whole)
    one = make(case.split()[0], policy, tmp_path, CASES[case], **ROUNDING)
    one.train()
    one.save_model(tmp_path / "final")
    if hasattr(one, "close"):
        one.close()
    torch.testing.assert_close(whole, load_file(tmp_path / "final" / file), rtol=1e-5, atol=1e-6)
