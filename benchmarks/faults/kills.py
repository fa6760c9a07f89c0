"""Runs that are killed at random moments and started again, until they end: the weights must be those of a run that
nothing happened to, bit for bit, and so must the evaluations and what was logged."""

import hashlib
import json
import operator
import random
import socket
import time
from pathlib import Path

from benchmarks.faults import processes, world
from benchmarks.faults.tally import Tally
from tests.trainers.accelerate_setups import under

LONGEST = 4
"""Kills of one run, at most."""
NOT_COMPARED = ("time", "runtime", "per_second", "flos", "memory", "seconds", "tokens/s", "arrived_share")
"""Of the process that ran, not of the training; `arrived_share` is of a push, and the first one is of all weights."""


def start(name: str, data: Path, output: Path) -> list[int]:
    """The processes of a line of the table, started."""
    count, argv = world.RUNS[name].processes, world.command(name, data, output)
    if count == 1:
        return [processes.start(output.parent / "log0", lambda: world.train(argv))]

    def train() -> int:
        with under(world.RUNS[name].setup):
            return world.train(argv)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        processes.start(
            output.parent / f"log{rank}",
            train,
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def finish(output: Path, children: list[int]) -> processes.Ended:
    """How the processes of a run ended: the first that is not as it should be speaks for all."""
    ended = [processes.finish(output.parent / f"log{rank}", child) for rank, child in enumerate(children)]
    return next((one for one in ended if one.problem or one.refused or one.killed), ended[0])


def result(output: Path) -> dict[str, str | list]:
    """What a run has made: digests of all weights that it saved, its evaluations, what it logged, and what the phases
    of a quickstart found."""
    found: dict[str, str | list] = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.suffix == ".safetensors" and "checkpoint-" not in name:
            found[name] = tensors_digest(path)
        elif path.name == "overoptimization.jsonl":
            found[name] = [_without_times(json.loads(line)) for line in path.read_text().splitlines()[1:]]
        elif path.name == "trainer_state.json":
            found[name] = [_without_times(entry) for entry in json.loads(path.read_text())["log_history"]]
        elif path.name == "phases.json":
            phases = json.loads(path.read_text())["phases"]
            found[name] = [[phase, _without_times(phases[phase]["result"])] for phase in sorted(phases)]
    return found


def tensors_digest(path: Path) -> str:
    """Of the tensors and their names: safetensors writes what stands beside them in no fixed order."""
    from safetensors.torch import load_file, save

    return hashlib.sha256(save(load_file(path))).hexdigest()


def _without_times(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if not any(word in key for word in NOT_COMPARED)}


def difference(expected: dict, found: dict) -> str | None:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            if name not in expected or name not in found:
                return f"{name} is only in one"
            return f"{name} differs{_first(expected[name], found[name])}"
    return None


def _first(expected: str | list, found: str | list) -> str:
    """Where two lists of entries begin to differ, and in what."""
    if isinstance(expected, str) or isinstance(found, str) or len(expected) != len(found):
        return ""
    number, (one, other) = next(pair for pair in enumerate(zip(expected, found, strict=True)) if operator.ne(*pair[1]))
    if not isinstance(one, dict) or not isinstance(other, dict):
        return f", entry {number}"
    keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
    return f", entry {number}: " + ", ".join(f"{key} {one.get(key)!r:.60} / {other.get(key)!r:.60}" for key in keys)


class Moment:
    """When a run is killed: after a share of its time, or while it writes a checkpoint, a cache or a model."""

    def __init__(self, draw: random.Random, seconds: float):
        self.writing = draw.random() < 0.5
        self.after = draw.uniform(0, 0.08 if self.writing else seconds)
        self.write = draw.randint(1, 3)  # the first, second ... one that is seen

    def wait(self, output: Path, alive) -> None:
        if not self.writing:
            end = time.monotonic() + self.after
            while alive() and time.monotonic() < end:
                time.sleep(0.002)
            return
        seen = _unfinished(output)
        before, left = set(seen), self.write
        while alive():
            now = _unfinished(output)
            if now - before:
                left -= 1
                before |= now
                if left == 0:
                    time.sleep(self.after)
                    return
            time.sleep(0.005)  # looking costs about a millisecond of the processor that the run needs


def _unfinished(output: Path) -> set[str]:
    """Names of what is being written in the folder of a run."""
    found = set()
    for path in output.rglob("*"):
        begun = path.name.startswith("checkpoint-") and not (path / "align_manifest.json").exists()
        if begun or path.name.startswith(".unfinished-") or path.name in ("model.safetensors", "config.json"):
            found.add(str(path))
    return found


def alive(child: int) -> bool:
    """Whether a child still runs; it stays to be waited for."""
    try:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run(tally: Tally, folder: Path, data: Path, seed: int, kills: int, until: float, which: str = "kills") -> None:
    """Kill runs of every line of the area in turn, until so many kills are made or the time is over."""
    draw = world.draw(seed, which)
    straight: dict[str, tuple[float, dict]] = {}
    lines = sorted(name for name, run_ in world.RUNS.items() if run_.area == which)
    made, runs, lines = 0, 0, draw.sample(lines, len(lines))
    while made < kills and time.monotonic() < until:
        for name in lines:
            if made >= kills or time.monotonic() > until:
                return
            area = f"killed: {name}"
            if name not in straight:
                output = folder / "straight" / name.replace(" ", "_") / "run"
                begin = time.monotonic()
                ended = finish(output, start(name, data, output))
                if ended.problem or ended.refused or ended.killed:
                    tally.add(area, "wrong", f"without any kill: {ended.refused or ended.problem or ended}")
                    straight[name] = (0.0, {})
                    continue
                straight[name] = (time.monotonic() - begin, result(output))
            if not straight[name][1]:
                continue
            runs += 1  # not the kills: a run that is over before its first one keeps its folder too
            made += _one(tally, area, name, folder / f"killed{runs}", data, draw, straight[name])


def _one(tally: Tally, area: str, name: str, folder: Path, data: Path, draw: random.Random, straight) -> int:
    """One run, killed once or several times; returns how often. Each kill counts as tried, and a run that goes wrong
    before it is killed."""
    output, seconds, expected = folder / "run", *straight
    wanted, moments = draw.randint(1, LONGEST), []
    for _ in range(wanted):
        moment = Moment(draw, seconds)
        children = start(name, data, output)
        moment.wait(output, lambda children=children: all(alive(child) for child in children))
        if not all(alive(child) for child in children):  # it was faster, or one of several has given up
            ended = finish(output, children)
            break
        first = draw.randrange(len(children))  # of several, one is killed and the scheduler ends the rest
        processes.kill(children[first])
        for child in children:
            if child != children[first]:
                processes.kill(child)
        ended = finish(output, children)
        moments.append(f"{'write' if moment.writing else 'time'} {moment.after:.3f}")
        if not ended.killed:
            break
    else:
        ended = finish(output, start(name, data, output))
    problem = ended.problem or ended.refused or difference(expected, result(output))
    outcome = "wrong" if problem else "exact"
    for _ in moments or [""] * bool(problem):
        when = ", ".join(moments) or "no moment"
        tally.add(area, outcome, f"killed at {when} of {seconds:.1f} s: {problem} (in {folder})")
    return len(moments)
