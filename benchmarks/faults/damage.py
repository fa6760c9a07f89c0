"""Every file that a run leaves or reads, damaged: it is passed over or refused in one sentence, or nothing changes."""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from align.distributed.checkpoints import damage as damage_of
from align.modeling.load import load_policy, load_tokenizer
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward
from benchmarks.faults import kills, processes, world
from benchmarks.faults.tally import Tally

RESUMED = 10
"""The first of so many damaged checkpoints is also resumed beside, to the end; the others must be seen as damaged."""
BATCH = RewardBatch(["describe the garden : ", "explain the ocean : "], ["rose soil", "wave stupid well"])


def flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def cut(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    length = rng.randrange(len(content))
    path.write_bytes(content[:length])
    return f"cut to {length} of {len(content)} bytes"


def empty(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return "emptied"


def remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "removed"


def folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "replaced by a folder"


def dangle(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return "replaced by a link to nothing"


def overwrite(path: Path, rng: random.Random) -> str:
    content = rng.choice([b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"\x00" * 64, b"{", b'{"a": 1}'])
    path.write_bytes(content)
    return f"overwritten with {content[:10]!r}"


CHECKPOINTS = "damaged checkpoints"
NOT_SEEN = ("damaged policies", "damaged adapters")
"""Of a finished model no checksums are kept, as transformers keeps none: a flipped bit of its weights is not looked
for. Its files are cut, emptied, removed, overwritten and replaced."""
HARMS: list[Callable[[Path, random.Random], str]] = [flip, flip, cut, empty, remove, folder, dangle, overwrite]
NOT_READ = ("align_config.yaml", "metrics.jsonl", "overoptimization.jsonl")
"""Beside a model, these are not opened when it is loaded, nor is an adapter's generation_config.json: not damaged."""
IGNORED = ("README.md", "training_args.bin", "curves", "log0", ".lock", ".align_lock", "output.txt", "outcome.json")


@dataclass
class Subject:
    """What is damaged. source: a whole folder, of which each damage gets a copy. files: which of those below it count,
    by their paths in it. use: reads the copy, in a child, and returns something that must be equal to `expected`."""

    area: str
    source: Path
    use: Callable[[Path], object]
    expected: object
    files: Callable[[Path], bool] = lambda path: True

    def names(self) -> list[Path]:
        found = [path for path in sorted(self.source.rglob("*")) if path.is_file() and path.stat().st_size]
        inside = [path.relative_to(self.source) for path in found]
        return [path for path in inside if not any(word in str(path) for word in IGNORED) and self.files(path)]


def resumed(name: str, data: Path) -> Callable[[Path], object]:
    """Start a line of the kills again in the copy of its run."""

    def use(copy: Path) -> object:
        world.train(world.command(name, data, copy))
        return as_plain(kills.result(copy))

    return use


def as_plain(value):
    """As it comes back from a child."""
    return json.loads(json.dumps(value))


def scores(copy: Path) -> object:
    reward = build_reward({"type": "ensemble", "path": str(copy), "aggregation": "mean"})
    return reward.score(BATCH).scores.tolist()


def logits(copy: Path) -> object:
    tokenizer = load_tokenizer(str(copy))
    model = load_policy(str(copy))
    ids = torch.tensor([tokenizer(BATCH.prompts[0] + BATCH.completions[0])["input_ids"]])
    with torch.no_grad():
        return [tokenizer.eos_token_id, tokenizer.pad_token_id, model.eval()(ids).logits.double().sum().item()]


def subjects(work: Path, data: Path) -> list[Subject]:
    """Runs, made here, and what reads them."""
    found = []
    for name in ("ppo", "sft, LoRA", "rloo, constrained"):
        output = work / name.replace(", ", "_") / "run"
        _made(kills.finish(output, kills.start(name, data, output)))
        expected = as_plain(kills.result(output))
        shutil.rmtree(output / f"checkpoint-{world.STEPS}")
        found.append(Subject(CHECKPOINTS, output, resumed(name, data), expected, _in_checkpoint))
        found.append(Subject("damaged files of a run", output, resumed(name, data), expected, _beside_checkpoints))
    for name in ("dpo, cached reference", "modpo"):
        cached = work / name.partition(",")[0] / "run"
        _made(kills.finish(cached, kills.start(name, data, cached)))
        expected = as_plain(kills.result(cached))
        for checkpoint in cached.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        found.append(Subject("damaged caches", cached, resumed(name, data), expected, _cache))
    ensemble = work / "members" / "run"
    _made(kills.finish(ensemble, kills.start("reward, three members", data, ensemble)))
    for checkpoint in ensemble.rglob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for area, folder_, use in (
        ("damaged reward models", ensemble, scores),
        ("damaged policies", work / "ppo" / "run", logits),
        ("damaged adapters", work / "sft_LoRA" / "run", logits),
    ):
        ended = processes.in_child(work / "whole", lambda f=folder_, u=use: u(f))
        _made(ended)
        read = _of_an_adapter if area == "damaged adapters" else _of_a_model
        found.append(Subject(area, folder_, use, ended.value, read))
    return found


def _in_checkpoint(path: Path) -> bool:
    return f"checkpoint-{world.STEPS - 2}" in str(path)


def _beside_checkpoints(path: Path) -> bool:
    return "checkpoint-" not in str(path)


def _of_a_model(path: Path) -> bool:
    return _beside_checkpoints(path) and path.name not in NOT_READ


def _of_an_adapter(path: Path) -> bool:
    return _of_a_model(path) and path.name != "generation_config.json"


def _cache(path: Path) -> bool:
    return "ref_log_probs" in path.parts or "margins" in path.parts


def _made(ended: processes.Ended) -> None:
    if ended.problem or ended.refused or ended.killed:
        raise SystemExit(f"without any damage: {ended}")


def one(tally: Tally, work: Path, subject: Subject, name: Path, harm, rng: random.Random, thorough: bool) -> None:
    copy = world.copied(subject.source, work / "copy" / subject.source.name)
    done = harm(copy / name, rng)
    what = f"{name} {done} (in {subject.source})"
    if subject.area == CHECKPOINTS and not thorough:
        checkpoint = copy / name.parts[0]
        if damage_of(checkpoint) is not None:
            tally.add(subject.area, "refused")
            return
    curve_gone = name.name == "overoptimization.jsonl" and not (copy / name).exists()
    ended = processes.in_child(work / "log", lambda: subject.use(copy))
    if ended.refused is not None:
        whole = ended.refused.isprintable()
        tally.add(subject.area, "refused" if whole else "wrong", f"{what}: no one line: {ended.refused!r}")
    elif ended.problem or ended.killed:
        tally.add(subject.area, "wrong", f"{what}: {ended.problem}")
    elif curve_gone and isinstance(subject.expected, dict) and isinstance(ended.value, dict):
        # all else is as it was, and the run says that its curve starts where it goes on
        told = "does not exist: its curve starts here" in (work / "log" / "output.txt").read_text()
        expected, found = ({**one, str(name): None} for one in (subject.expected, ended.value))
        tally.add(
            subject.area, "exact" if told and found == expected else "wrong", f"{what}: {_where(expected, found)}"
        )
    else:
        same = ended.value == subject.expected
        tally.add(subject.area, "exact" if same else "wrong", f"{what}: {_where(subject.expected, ended.value)}")


def _where(expected, found) -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        return kills.difference(expected, found) or ""
    return f"{found} instead of {expected}"


def run(tally: Tally, work: Path, data: Path, seed: int, number: int, until: float) -> None:
    rng, tried, checkpoints = world.draw(seed, "damage"), 0, 0
    made = subjects(work, data)
    while tried < number:
        for subject in made:
            names = subject.names()
            count = 4 if subject.area == CHECKPOINTS else 3 if "files of a run" not in subject.area else 1
            for _ in range(count):
                if tried >= number or time.monotonic() > until:
                    return
                tried += 1
                harm = rng.choice(HARMS[2:] if subject.area in NOT_SEEN else HARMS)
                thorough = subject.area == CHECKPOINTS and checkpoints % RESUMED == 0
                checkpoints += subject.area == CHECKPOINTS
                one(tally, work, subject, rng.choice(names), harm, rng, thorough)
