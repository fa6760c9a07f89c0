"""Ranks that torchrun starts on processors alone, `use_cpu` not said: one run of two, not two runs."""

import pytest
import torch

from tests.warm import run_ranks

SCRIPT = """
from align.trainers.core.options import BaseConfig

args = BaseConfig(output_dir="run", report_to="none")
print(args.world_size, args.parallel_mode.name, args.use_cpu)
if args.world_size > 1:
    args.distributed_state.wait_for_everyone()  # the first holds the store that the second still connects by
"""


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_ranks_are_one_run(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = run_ranks(str(tmp_path / "script.py"), logs=tmp_path / "logs")
    assert [text.splitlines()[-1] for text in printed] == ["2 DISTRIBUTED False"] * 2
