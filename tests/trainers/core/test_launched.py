"""Ranks that torchrun starts on processors alone, `use_cpu` not said: one run of two, not two runs."""

import pytest
import torch

from tests.warm import run_ranks

SCRIPT = """
import time
import torch.distributed as dist
from align.trainers.core.options import BaseConfig

args = BaseConfig(output_dir="run", report_to="none", ddp_timeout=2)
print(args.world_size, args.parallel_mode.name, args.use_cpu)
dist.barrier()  # the first holds the store that the second still connects by
start = time.monotonic()
if dist.get_rank() == 0:
    try:
        dist.barrier()
    except RuntimeError as error:
        print("gloo" in str(error), 1 < time.monotonic() - start < 4)
else:
    time.sleep(5)
    print(True, True)
"""


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_ranks_are_one_run_that_waits_no_longer_than_it_is_told(tmp_path, monkeypatch):
    """transformers gives `ddp_timeout` to the processes' group on GPUs alone."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = run_ranks(str(tmp_path / "script.py"), logs=tmp_path / "logs")
    assert [text.splitlines()[-2:] for text in printed] == [["2 DISTRIBUTED False", "True True"]] * 2
