"""What the live page of a run shows, read from the files that the run writes: metrics.jsonl and the evaluation file."""

from pathlib import Path
from typing import Any

from align.evaluation import completions_file, metrics_file, records
from align.evaluation.report import text
from align.evaluation.task import of_the_task
from align.evaluation.thin import ThinCurve, thin

SAMPLES = 40  # prompts
NAME = 120  # characters of a prompt in the list of prompts


class Watch:
    """A run's files, followed: `update` reads what is new in the logs, and the evaluation file where it has changed.

    changes: grows whenever there is something new. samples: by prompt, what the policy answered at each evaluation.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.metrics = metrics_file.MetricsFollower(folder)
        self._evaluated: dict[str, tuple[int, int, int]] = {}
        self._evaluations = 0
        self._figures: list[dict] = []
        self.samples: dict[str, list[dict]] = {}

    @property
    def changes(self) -> int:
        return self.metrics.changes + self._evaluations

    def update(self) -> None:
        """Raises DataError where a file is damaged, OSError where it cannot be read."""
        self.metrics.update()
        stats = {}
        for name in (records.FILE_NAME, completions_file.FILE_NAME):  # of on-policy runs, and of the others
            try:
                stats[name] = (self.folder / name).stat()
            except FileNotFoundError:  # no evaluation yet, or a run without completions
                pass
        now = {name: (found.st_ino, found.st_size, found.st_mtime_ns) for name, found in stats.items()}
        if now == self._evaluated:
            return
        figures: list[dict] = []
        samples: dict[str, list[dict]] = {}
        if completions_file.FILE_NAME in stats:
            samples = _answers(completions_file.read_completions(self.folder))
        if records.FILE_NAME in stats:
            try:
                run = of_the_task(records.read_run(self.folder))
                figures, samples = [_proxy_and_gold(run), _kl(run)], _samples(run)
            except records.NoEvaluation:
                pass
        self._figures, self.samples, self._evaluated = figures, samples, now
        self._evaluations += 1

    def state(self) -> dict[str, Any]:
        """The state of a run, without its samples (`prompts` are their names): plain values, to be sent as JSON. A run
        that has written nothing yet is empty."""
        header, last = self.metrics.header or {}, self.metrics.last or {}
        curves = self.metrics.curves
        return {
            "name": self.folder.absolute().name,
            "header": {k: v for k, v in header.items() if k in ("method", "started", "processes", "versions")},
            "step": last.get("step", 0) if header else None,
            "max_steps": header.get("max_steps"),
            "at": last.get("at"),
            "ended": "train_runtime" in last,
            "phases": dict(sorted(self.metrics.phases.items(), key=lambda item: -item[1])),
            "figures": [*self._figures, *_training(curves)],
            "prompts": [prompt[:NAME] for prompt in self.samples],
            "not_finite": {name: c.not_finite_from for name, c in curves.items() if c.not_finite_from is not None},
        }


def snapshot(folder: str | Path) -> dict[str, Any]:
    """The state of a run, with its samples and its settings."""
    watch = Watch(folder)
    watch.update()
    return {**watch.state(), "samples": watch.samples, "settings": (watch.metrics.header or {}).get("settings", {})}


def _figure(y: str, curves: dict[str, ThinCurve]) -> dict:
    lines = []
    for name, curve in curves.items():
        x, values = curve.points()
        lines.append({"name": name, "x": x, "y": values})
    return {"x": "optimiser step", "y": y, "curves": lines}


def _proxy_and_gold(run: records.Run) -> dict:
    steps = run.step.tolist()
    curves = {f"proxy ({run.proxy_name})": thin(steps, run.proxy.tolist())}
    if run.gold is not None:
        curves[f"gold ({run.gold_name})"] = thin(steps, run.gold.tolist())
    return _figure("proxy and gold score", curves)


def _kl(run: records.Run) -> dict:
    return _figure("KL to the reference (nats)", {"k3 estimate": thin(run.step.tolist(), run.kl_k3.tolist())})


def _training(curves: dict[str, ThinCurve]) -> list[dict]:
    """One figure per group of metrics that belong together; what has a time or a rate is no curve."""
    groups: dict[str, dict[str, ThinCurve]] = {}
    for name, curve in curves.items():
        if name.startswith(("time/", "train_")) or name.endswith(("_runtime", "_per_second")) or name == "epoch":
            continue
        part, _, rest = name.removeprefix("eval_").partition("/")
        ends_with = rest.rpartition("/")[2]
        group = f"{part}: {ends_with}" if part == "constraints" else part
        groups.setdefault(group, {})[name] = curve
    first = [name for name in groups if name.startswith("constraints") or name in ("loss", "reward", "rewards")]
    return [_figure(name, groups[name]) for name in sorted(groups, key=lambda name: (name not in first, name))]


def _samples(run: records.Run) -> dict[str, list[dict]]:
    """By prompt: what the policy answered at each evaluation."""
    found: dict[str, list[dict]] = {}
    for step, samples in zip(run.step.tolist(), run.samples, strict=True):
        for sample in samples[:SAMPLES]:
            scores = {key: sample.get(key) for key in ("proxy", "gold")}
            found.setdefault(text(sample["prompt"]), []).append(
                {"step": step, "completion": text(sample["completion"]), **scores}
            )
    return found


def _answers(evaluations: list[dict]) -> dict[str, list[dict]]:
    """`_samples` of a run on demonstrations or pairs, whose answers have no scores."""
    found: dict[str, list[dict]] = {}
    for evaluation in evaluations:
        for sample in evaluation["samples"][:SAMPLES]:
            answer = {"step": evaluation["step"], "completion": sample["completion"], "proxy": None, "gold": None}
            found.setdefault(sample["prompt"], []).append(answer)
    return found
