"""Which model types of transformers train: tiny random ones, by the trainers themselves.

    python benchmarks/architectures.py [--types qwen3 gemma2 ...] [--output FILE] [--again] [--seconds 150]

A model of two layers is made for each type from its default configuration (`tiny.configs`), and trained for two steps
in each stage (`tiny.stages`), each in a process of its own:

    model           it can be made, saved and loaded; rows that are padded have the log-probs of rows alone
    sft, dpo        what is saved, loaded by transformers and by align, has the log-probs of what was trained
    dpo padded      where `dpo` has shared prompts: losses and gradient norms are those of padded pairs
    dpo lora        the same of an adapter on `all-linear`, which PEFT loads on transformers' base
    dpo bf16        log-probs of mixed precision are those of float32 within 2 %
    reward          scores of what was saved are those of what was trained
    reward padded   where `reward` has shared prompts, as above
    rloo            with `rollout.backend: transformers`, whose log-probs are the trainer's

FILE gets a line of JSON for each type: of each stage what it measured (`ok`), the sentence of an `AlignError`
(`refused`), an error or numbers that differ (`failed`), or why it was left out (`not tried`). Types that FILE has are
kept, unless `--again`. A type takes 5 to 30 seconds of one core.
"""

import argparse
import gc
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "architectures.jsonl"
STAGES = ("model", "sft", "dpo", "dpo padded", "dpo lora", "dpo bf16", "reward", "reward padded", "rloo")


def all_types() -> dict[str, bool]:
    """Model types of causal classes, and those of text and images that our loader takes; true for the former."""
    from transformers.models.auto import modeling_auto as auto

    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return {kind: kind in causal for kind in sorted({*causal, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})}


def read(path: Path) -> dict[str, dict]:
    """The lines of a file by type; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {entry["type"]: entry for entry in map(json.loads, lines)}


def write(path: Path, entries: dict[str, dict]) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(f"{json.dumps(entries[kind])}\n" for kind in sorted(entries)), encoding="utf-8")
    new.replace(path)


# ---- one type -------------------------------------------------------------------------------------------------------


class Tries:
    """The stages of one type, in a folder that is removed afterwards. seconds: what one may take."""

    def __init__(self, kind: str, folder: Path, seconds: float):
        self.kind, self.folder, self.seconds = kind, folder, seconds
        self.found: dict[str, dict] = {}

    def run(self, stage: str, function: Callable[[], dict]) -> dict | None:
        """Its measurements; None where it came to none."""
        from benchmarks.faults.processes import in_child

        ended = in_child(self.folder / "processes", function, seconds=self.seconds)
        if ended.refused is not None:
            self.found[stage] = {"refused": self.shown(ended.refused)}
        elif ended.value is None:
            self.found[stage] = {"failed": self.shown(_last_line(ended.problem or "killed"))}
        else:
            self.found[stage] = {"ok": _rounded(ended.value)}
        return ended.value

    def leave_out(self, stage: str, why: str) -> None:
        self.found[stage] = {"not tried": why}

    def shown(self, text: str) -> str:
        return text.replace(f"{self.folder}/", "").replace(str(ROOT), "")[:600]

    def compare(self, stage: str, function: Callable[[], dict]) -> None:
        """Numbers of a stage that ended against those of another."""
        from benchmarks.tiny.stages import Unlike

        try:
            self.found[stage]["ok"] |= _rounded(function())
        except Unlike as error:
            self.found[stage] = {"failed": str(error)}


def _last_line(problem: str) -> str:
    """What a traceback ends with, and where it was raised."""
    lines = problem.strip().splitlines()
    places = [line for line in lines if re.match(r'\s+File ".*", line \d+, in ', line)]
    error = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Unlike)\b", line)), lines[-1])
    if ".Unlike: " in error or not places:
        return error.rpartition(".Unlike: ")[2]
    path, function = re.findall(r'File "(.*)", line \d+, in (.*)', places[-1])[0]
    return f"{error} ({'/'.join(Path(path).parts[-2:])}, {function})"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items() if v is not None and v != []}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def try_type(kind: str, folder: Path, seconds: float) -> dict[str, Any]:
    from benchmarks.tiny import stages

    tries, model = Tries(kind, folder, seconds), str(folder / kind)
    entry = {
        "type": kind,
        "causal": all_types()[kind],
        "transformers": version("transformers"),
        "stages": tries.found,
    }
    if tries.run("model", partial(stages.make_model, kind, model)) is None:
        return entry
    tries.run("sft", partial(stages.sft, model, folder / "sft"))
    dpo = tries.run("dpo", partial(stages.dpo, model, folder / "dpo"))
    _padded(tries, "dpo", dpo, partial(stages.dpo, model))
    tries.run("dpo lora", partial(stages.dpo, model, folder / "lora", lora=True))
    half = tries.run("dpo bf16", partial(stages.dpo, model, folder / "bf16", bf16=True))
    if dpo and half:
        tries.compare("dpo bf16", lambda: stages.close_in_bfloat16(half, dpo))
    scored = tries.run("reward", partial(stages.reward, model, folder / "reward"))
    _padded(tries, "reward", scored, partial(stages.reward, model))
    tries.run("rloo", partial(stages.rloo, model, folder / "rloo"))
    return entry


def _padded(tries: Tries, stage: str, shared: dict | None, again: Callable[..., dict]) -> None:
    from benchmarks.tiny.stages import same_steps

    name = f"{stage} padded"
    if shared is None or shared.get("why padded"):
        why = f"{stage} did not end" if shared is None else f"{stage} is padded by itself"
        tries.leave_out(name, why)
        return
    padded = tries.run(name, partial(again, tries.folder / name.replace(" ", "_"), batching="padded"))
    if padded:
        tries.compare(name, lambda: same_steps(shared, padded))


def run(kinds: list[str], path: Path, again: bool, seconds: float) -> None:
    from benchmarks.faults.processes import import_everything

    import_everything()
    gc.collect()
    gc.freeze()  # neither looked through by each child nor copied for it
    warnings.filterwarnings("ignore")
    entries = read(path)
    for kind in kinds:
        if kind in entries and not again:
            continue
        folder = Path(tempfile.mkdtemp(prefix="architectures-"))
        try:
            entries[kind] = try_type(kind, folder, seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        entries = read(path) | {kind: entries[kind]}
        write(path, entries)
        print(kind, "; ".join(exceptions(entries[kind])) or "ok", flush=True)


# ---- what is shown --------------------------------------------------------------------------------------------------


def outcome(entry: dict, stage: str) -> str:
    """ok, refused, failed or not tried."""
    return next(iter(entry["stages"].get(stage, {"not tried": ""})))


def exceptions(entry: dict) -> list[str]:
    """Of each stage that did not end well: what came of it."""
    return [
        f"{stage} {how}: {what}"
        for stage, found in entry["stages"].items()
        for how, what in found.items()
        if how in ("refused", "failed")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="model types [all]")
    parser.add_argument("--output", type=Path, default=RESULT, help="a file of JSON lines [that of benchmarks/results]")
    parser.add_argument("--again", action="store_true", help="also what the file has")
    parser.add_argument("--seconds", type=float, default=150.0, help="what one stage may take [150]")
    args = parser.parse_args()
    known = all_types()
    unknown = set(args.types or ()) - set(known)
    if unknown:
        parser.error(f"no causal model types of transformers: {', '.join(sorted(unknown))}")
    run(args.types or known, args.output, args.again, args.seconds)


if __name__ == "__main__":  # the tests import this file
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[0] = str(ROOT)
    main()
