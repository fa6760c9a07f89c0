"""A page about runs of any method, from what they have logged: curves side by side, settings that differ, versions,
phase times, completions."""

from pathlib import Path
from typing import Any

from align.errors import DataError
from align.evaluation import metrics_file
from align.evaluation.watch import snapshot

TEMPLATE = "runs.html.j2"


def compare_runs(folders: dict[str, Path]) -> dict[str, Any]:
    """What the page shows of runs by name: `figures` (as the page's script draws them, a curve per run and metric),
    `differ` and `same` (settings, versions: {key: {run: value}}), `phases` (seconds by run) and `samples` (by prompt,
    the last answer of each run). DataError for a folder without logs."""
    for folder in folders.values():
        if not (folder / metrics_file.FILE_NAME).exists():
            raise DataError(f"{folder} holds no {metrics_file.FILE_NAME}: give the output folders of runs")
    states = {name: snapshot(folder) for name, folder in folders.items()}
    figures: dict[str, dict] = {}
    for name, state in states.items():
        for figure in state["figures"]:
            merged = figures.setdefault(figure["y"], {**figure, "curves": []})
            merged["curves"] += [{**curve, "name": f"{name}: {curve['name']}"} for curve in figure["curves"]]
    table: dict[str, dict[str, Any]] = {}
    for name, state in states.items():
        own = {key: state["header"].get(key) for key in ("method", "started", "processes", "versions")}
        for key, value in {**own, "max_steps": state["max_steps"], **state["settings"]}.items():
            table.setdefault(key, {})[name] = value
    for row in table.values():
        for name in states:
            row.setdefault(name, None)
    differ = {
        key: row for key, row in table.items() if any(value != next(iter(row.values())) for value in row.values())
    }
    prompts = dict.fromkeys(prompt for state in states.values() for prompt in state["samples"])
    samples = {
        prompt: {name: state["samples"][prompt][-1] for name, state in states.items() if prompt in state["samples"]}
        for prompt in prompts
    }
    return {
        "runs": list(states),
        "steps": {name: (state["step"], state["max_steps"], state["ended"]) for name, state in states.items()},
        "figures": list(figures.values()),
        "not_finite": {name: state["not_finite"] for name, state in states.items() if state["not_finite"]},
        "differ": differ,
        "same": {key: row for key, row in table.items() if key not in differ},
        "phases": {name: state["phases"] for name, state in states.items()},
        "samples": samples,
    }


def write_runs_report(path: str | Path, folders: dict[str, Path]) -> Path:
    """Write the page of runs by name."""
    from align.evaluation.report import render_page

    return render_page(Path(path), TEMPLATE, r=compare_runs(folders))
