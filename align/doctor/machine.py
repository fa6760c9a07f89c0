"""The lines of `align doctor`: versions, what a run will use, and a self-check in stages."""

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.doctor.lines import Line, attempt
from align.rollout.vllm_versions import DISTRIBUTION, found_vllm, installed

PYTHON = (3, 11)
TESTED_SET = Path(__file__).parents[1] / "constraints.txt"
TWO_PROCESSES = (
    "import datetime, os, torch, torch.distributed as dist\n"
    "gpu = torch.cuda.is_available() and torch.cuda.device_count() > 1\n"
    "dist.init_process_group('nccl' if gpu else 'gloo', timeout=datetime.timedelta(seconds=40))\n"
    "rank = dist.get_rank()\n"
    "x = torch.full((1000,), float(rank + 1), device=f'cuda:{rank}' if gpu else 'cpu')\n"
    "dist.all_reduce(x)\n"
    "assert x.unique().tolist() == [3.0], x\n"
    "dist.destroy_process_group()\n"
)


def lines(model: str | None, backend: str | None, *, self_check: bool) -> Iterator[Line]:
    """All lines, each when it is known."""
    yield from versions()
    yield from used(model)
    if self_check:
        yield from checks(backend)


# ---- versions -------------------------------------------------------------------------------------------------------


def tested() -> dict[str, str]:
    """The version of each package in the tested set (constraints.txt, a part of the package)."""
    text = TESTED_SET.read_text(encoding="utf-8")
    pins = (line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {_name(name): version.partition(";")[0].strip() for name, version in pins}


def _name(text: str) -> str:
    return text.strip().lower().replace("_", "-")


def versions() -> Iterator[Line]:
    """Of Python and every package that the library needs, against the ranges that it declares."""
    from packaging.requirements import Requirement

    found = ".".join(map(str, sys.version_info[:3]))
    right = sys.version_info[:2] >= PYTHON
    remedy = "" if right else f"install Python {PYTHON[0]}.{PYTHON[1]} or newer, and the library in it"
    yield Line(
        "python", "passed" if right else "failed", f"{found} on {platform.system()} {platform.machine()}", remedy
    )
    pins = tested()
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield version_line(requirement, installed(requirement.name), pins.get(_name(requirement.name)))
    yield _engine_version(pins)


def version_line(requirement, version: str | None, pin: str | None) -> Line:
    """version: that is installed, None for none. pin: of the tested set."""
    what, wanted = requirement.name, str(requirement.specifier)
    remedy = f"pip install '{what}{f'=={pin}' if pin else wanted}'"
    if version is None:
        return Line(what, "failed", f"not installed, {wanted} is needed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Line(what, "failed", f"{version}, {wanted} is needed", remedy)
    same = "as tested" if version.partition("+")[0] == pin else f"tested with {pin}" if pin else "not in the tested set"
    return Line(what, "passed", f"{version} ({same})")


def _engine_version(pins: dict[str, str]) -> Line:
    """Of vLLM, under either name, against the range of the extra of that name."""
    if (vllm := found_vllm()) is not None:
        line = version_line(vllm.requirement, vllm.version, pins.get(vllm.name))
        line.what, line.found = "vllm", f"{vllm.name} {line.found}"
        return line
    return Line(
        "vllm", "note", "not installed: rollouts are made by transformers, slowly. `pip install 'align-rlhf[vllm]'`"
    )


# ---- what a run uses ------------------------------------------------------------------------------------------------


def used(model: str | None) -> Iterator[Line]:
    import torch

    yield attempt(
        "device", _device, "the driver must be at least as new as the CUDA version that PyTorch was built for"
    )
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported()
    why = "the GPU has bfloat16" if bf16 else "the GPU has no bfloat16" if cuda else "no GPU"
    yield Line("precision", "note", f"{'bf16' if bf16 else 'float32'} unless a config says otherwise ({why})")
    yield attempt("rollout engine", _engine, "install vLLM anew, for the PyTorch that is installed")
    flash = next((f"{name} {v}" for name in ("flash-attn", "kernels") if (v := installed(name))), None)
    yield Line("attention", "note", f"sdpa by default; {flash or 'flash-attn is not installed'}")
    free = free_gib(Path.cwd())
    state, remedy = ("passed", "") if free > 2 else ("failed", "free some space, or write to another disk (output_dir)")
    yield Line("disk", state, f"{free:.1f} GiB free in {Path.cwd()}", remedy)
    if model is not None:
        yield attempt(
            f"shared prefixes of {model}", lambda: _shared_prefixes(model), "is it a causal language model's folder?"
        )


def free_gib(folder: Path) -> float:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize / 2**30


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda and Path("/proc/driver/nvidia").exists():
            raise RuntimeError(f"there is an NVIDIA driver, but PyTorch (CUDA {torch.version.cuda}) finds no GPU")
        return f"CPU, {torch.get_num_threads()} threads (no GPU that PyTorch {torch.__version__} can use)"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    torch.ones(1, device="cuda").sum().item()
    return "; ".join(f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in found)


def _engine() -> str:
    from align.rollout.make import choose_backend

    return f"{choose_backend('auto')} (rollout: auto)"


def _shared_prefixes(name: str) -> Line:
    from align.modeling.load import load_policy
    from align.modeling.prefix_support import enable_shared_prefix

    why = enable_shared_prefix(load_policy(name), None)
    return Line(f"shared prefixes of {name}", "note", "used" if why is None else f"not used, rows are padded: {why}")


# ---- self-check -----------------------------------------------------------------------------------------------------


def checks(backend: str | None) -> Iterator[Line]:
    """A step, a rollout, a push and two processes, each as small as can be, with a model made on the spot."""
    with tempfile.TemporaryDirectory(prefix="align-doctor-") as folder:
        made: dict[str, Any] = {}
        for what, stage, remedy in (
            (
                "a training step",
                lambda: _step(Path(folder), made),
                f"install the tested set: pip install -c {TESTED_SET} align-rlhf",
            ),
            (
                "a rollout",
                lambda: _rollout(made, backend),
                "try `--backend transformers`; if that passes, install vLLM anew",
            ),
            ("a push of weights", lambda: _push(made), "the versions of vLLM and transformers do not fit: see above"),
        ):
            if what != "a training step" and not made:
                yield Line(what, "skipped", "the stage before it failed")
                continue
            yield attempt(what, stage, remedy)
        if "engine" in made:
            made["engine"].close()
    yield attempt(
        "two processes",
        _two_processes,
        "set GLOO_SOCKET_IFNAME (or NCCL_SOCKET_IFNAME) to a network interface that is up",
    )


def _step(folder: Path, made: dict) -> str:
    """One step of SFT on the toy world, saved and read back."""
    import torch
    from datasets import Dataset

    from align.data import toy
    from align.quickstart.phases import make_policy
    from align.trainers.sft import SFTConfig, SFTTrainer

    tokenizer = toy.tokenizer()
    policy = make_policy(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=0)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    rows = toy.reference_text(toy.split_prompts(0, 8)[0], 1, 0)
    args = SFTConfig(
        output_dir=str(folder / "run"),
        max_steps=1,
        max_length=32,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(str(folder / "policy"), args, Dataset.from_list(rows))
    loss = trainer.train().training_loss
    trainer.save_model()
    moved = sum(
        not torch.equal(a.detach().cpu().float(), b)
        for a, b in zip(trainer.model.parameters(), policy.parameters(), strict=True)
    )
    if not moved:
        raise RuntimeError("a step has changed no weight")
    made |= {"model": trainer.model, "tokenizer": tokenizer, "start": str(folder / "policy")}
    return f"loss {loss:.3f} on {next(trainer.model.parameters()).device}, saved and read back"


def _rollout(made: dict, backend: str | None) -> str:
    """Completions of an engine that starts from the weights of before the step."""
    import torch

    from align.modeling.load import load_policy
    from align.rollout import SamplingParams, make_engine
    from align.rollout.make import choose_backend

    start = load_policy(made["start"]).to(next(made["model"].parameters()).device)
    name = choose_backend(backend or ("auto" if torch.cuda.is_available() else "transformers"))
    made["engine"] = engine = make_engine(start, made["tokenizer"], backend=name, max_model_len=32)
    prompts = [made["tokenizer"](text)["input_ids"] for text in ("describe the garden : ", "explain the ocean : ")]
    completions = engine.generate(prompts, SamplingParams(n=2, max_tokens=6, temperature=0.7))
    tokens = sum(len(one.token_ids) for rollout in completions for one in rollout.completions)
    return f"{name}: {tokens} tokens, log-probs as the trainer's"


def _push(made: dict) -> str:
    """The weights of after the step."""
    if "engine" not in made:
        raise RuntimeError("there is no engine to push to")
    report = made["engine"].push(made["model"], 1)
    probe = made["engine"].verify(made["model"])
    proved = (
        "log-probs compared"
        if report.proved_tensors is None
        else f"{report.proved_tensors} tensors the same bit by bit"
    )
    return f"{report.seconds:.2f} s, {proved}; log-probs differ by {probe.mean_abs_diff:.2g} on average"


def _two_processes() -> str:
    """A sum over two processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError(
            next((e.strip().splitlines()[-1] for e in errors if e.strip()), "one of two processes failed")
        )
    return "they see each other and agree on a sum"
