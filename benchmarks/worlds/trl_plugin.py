"""A pytest plugin: align's trainers and configs in the place of TRL's, before TRL's tests import them; what passed and
what did not goes to the file that TRL_SUITE_RESULT names, test by test.

Deselected: tests of TRL's own collators and kernels, and those of images, vLLM, Liger, kernels, quantisation and GPUs.
"""

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import trl
import trl.trainer
from trl import import_utils
from trl.trainer import sft_trainer

import align

EXCHANGED = tuple(
    f"{method}{part}" for method in ("DPO", "SFT", "Reward", "RLOO", "GRPO") for part in ("Trainer", "Config")
)
CLASSES = {f"Test{name}" for name in EXCHANGED if name.endswith("Trainer")}
ELSEWHERE = ("vlm", "vision", "image", "ConditionalGeneration", "vllm", "liger", "quantization", "multimodal")

for name in EXCHANGED:
    ours = getattr(align, name)
    if name in ("RLOOConfig", "GRPOConfig"):  # TRL generates with transformers too unless it is asked not to
        ours = partial(ours, rollout="transformers")
    for module in (trl, trl.trainer):
        setattr(module, name, ours)
for name in ("is_joblib_available", "is_harbor_available", "is_openreward_available", "is_jmespath_available"):
    if not hasattr(import_utils, name):  # TRL's tests may be of another version than the package
        setattr(import_utils, name, lambda: False)

for name in ("dft_loss", "_chunked_cross_entropy_loss", "_patch_chunked_ce_lm_head"):  # their tests are left out
    if not hasattr(sft_trainer, name):
        setattr(sft_trainer, name, None)

RESULT: dict = {"passed": [], "failed": {}, "skipped": {}, "deselected": Counter()}


def pytest_collection_modifyitems(config, items):
    kept, left = [], []
    for item in items:
        if item.cls is None or item.cls.__name__ not in CLASSES:
            reason = "not of the trainer"
        else:
            reason = next((word for word in ELSEWHERE if word.lower() in item.name.lower()), None)
        if reason is None:
            kept.append(item)
        else:
            RESULT["deselected"][reason] += 1
            left.append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def pytest_runtest_logreport(report):
    name = report.nodeid.split("::", 2)[-1]
    if report.failed:
        RESULT["failed"][name] = str(report.longrepr).strip().splitlines()[-1][:400]
    elif report.skipped:
        RESULT["skipped"][name] = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    elif report.when == "call":
        RESULT["passed"].append(name)
    if report.when == "teardown" or not report.passed:
        Path(os.environ["TRL_SUITE_RESULT"]).write_text(json.dumps(RESULT, indent=1), encoding="utf-8")


@pytest.fixture
def lazy_shared_datadir(request):
    """The fixture of pytest-datadir that TRL's tests use."""
    return Path(request.path).parent / "data"
