"""What the live page of a run shows, read from the files that the run writes: metrics.jsonl and the evaluation file."""

from pathlib import Path
from typing import Any

from align.errors import DataError
from align.evaluation import metrics_file, records
from align.evaluation.report import text
from align.evaluation.task import of_the_task

POINTS = 600  # of a curve at most: more than a screen can show
SAMPLES = 40  # prompts


def snapshot(folder: str | Path) -> dict[str, Any]:
    """The state of a run: plain values, to be sent as JSON. A run that has written nothing yet is empty."""
    folder = Path(folder)
    found: dict[str, Any] = {
        "name": folder.absolute().name,
        "step": None,
        "max_steps": None,
        "figures": [],
        "phases": {},
    }
    found |= {"samples": {}, "header": {}, "ended": None}
    if (folder / metrics_file.FILE_NAME).exists():
        metrics = metrics_file.read_metrics(folder)
        found["header"] = {
            k: v for k, v in metrics.header.items() if k in ("method", "started", "processes", "versions")
        }
        found["max_steps"] = metrics.header.get("max_steps")
        found["step"] = metrics.logs[-1]["step"] if metrics.logs else 0
        found["at"] = metrics.logs[-1]["at"] if metrics.logs else None
        found["ended"] = bool(metrics.logs) and "train_runtime" in metrics.logs[-1]
        found["phases"] = metrics.phases()
        found["figures"] = _training(metrics.curves())
    try:
        run = of_the_task(records.read_run(folder))
    except DataError:  # no evaluation yet, or a method without
        return found
    found["figures"] = [_proxy_and_gold(run), _kl(run), *found["figures"]]
    found["samples"] = _samples(run)
    return found


def _thin(values: list) -> list:
    every = max(len(values) // POINTS, 1)
    return values[::every] if (len(values) - 1) % every == 0 else [*values[::every], values[-1]]


def _figure(y: str, curves: dict[str, tuple[list, list]]) -> dict:
    lines = [{"name": name, "x": _thin(x), "y": _thin(values)} for name, (x, values) in curves.items()]
    return {"x": "optimiser step", "y": y, "curves": lines}


def _proxy_and_gold(run: records.Run) -> dict:
    steps = run.step.tolist()
    curves = {f"proxy ({run.proxy_name})": (steps, run.proxy.tolist())}
    if run.gold is not None:
        curves[f"gold ({run.gold_name})"] = (steps, run.gold.tolist())
    return _figure("proxy and gold score", curves)


def _kl(run: records.Run) -> dict:
    return _figure("KL to the reference (nats)", {"k3 estimate": (run.step.tolist(), run.kl_k3.tolist())})


def _training(curves: dict[str, tuple[list[float], list[float]]]) -> list[dict]:
    """One figure per group of metrics that belong together; what has a time or a rate is no curve."""
    groups: dict[str, dict] = {}
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
