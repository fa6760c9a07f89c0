"""Pictures of fronts, from the summary that `align.evaluation.front_scores.summarise` makes."""

from itertools import combinations

import numpy as np

from align.evaluation.plots import COLOURS, MARKERS, panels, style


def plot_fronts(summary: dict):
    """One panel per pair of objectives, and the KL of every point. Returns a matplotlib Figure.

    Filled: trained, hollow: soups; bars are 95 % intervals over prompts; a line joins the points of a front that no
    other of its points dominates; the numbers are the weight of the first objective.
    """
    pairs = list(combinations(summary["objectives"], 2))
    with style():
        figure, axes = panels(len(pairs) + 1, above=0.35, height=3.4)
        for axis, (x, y) in zip(axes.flat, pairs, strict=False):
            _pair(axis, summary, x, y)
        _kl(axes.flat[len(pairs)], summary)
        for axis in axes.flat[len(pairs) + 1 :]:
            axis.set_axis_off()
        return figure


def _pair(axis, summary: dict, x: str, y: str) -> None:
    start = summary["reference"]["scores"]
    axis.plot(start[x]["mean"], start[y]["mean"], "*", color="#777777", markersize=13, label="reference policy")
    for number, (name, run) in enumerate(summary["runs"].items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        label, others = name, any(point["kind"] != "soup" for point in run["points"])
        for point in run["points"]:
            _mark(axis, point["scores"][x], point["scores"][y], colour, marker, point["kind"] != "soup", label)
            label = None
            if point["weights"] and (point["kind"] != "soup" or not others):  # soups between trained points: no room
                weight = next(iter(point["weights"].values()))
                point_at = (point["scores"][x]["mean"], point["scores"][y]["mean"])
                axis.annotate(f"{weight:.2g}", point_at, (5, 4), textcoords="offset points", fontsize=7.5, color=colour)
        best = sorted((p["scores"][x]["mean"], p["scores"][y]["mean"]) for p in run["points"] if p["non_dominated"])
        axis.plot(*zip(*best, strict=True), color=colour, linewidth=1.2, alpha=0.7)
    axis.set(xlabel=x, ylabel=y, title=f"{y} against {x}")
    axis.legend(fontsize=8.5)


def _kl(axis, summary: dict) -> None:
    for number, (name, run) in enumerate(summary["runs"].items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        label = name
        for point in run["points"]:
            weight = next(iter(point["weights"].values()), None)
            if weight is None:  # of a single policy, which stands at no weight
                axis.axhline(point["kl"]["mean"], color=colour, linestyle=":", label=label)
                continue
            where = {"mean": weight, "low": weight, "high": weight}
            _mark(axis, where, point["kl"], colour, marker, point["kind"] != "soup", label)
            label = None
    axis.set(xlabel="weight of the first objective", ylabel="KL to the reference (nats)", title="what it costs")
    axis.set_ylim(bottom=0)


def _mark(axis, x: dict, y: dict, colour: str, marker: str, filled: bool, label: str | None) -> None:
    def reach(values: dict) -> np.ndarray:
        return np.abs([[values["mean"] - values["low"]], [values["high"] - values["mean"]]])

    axis.errorbar(
        x["mean"],
        y["mean"],
        xerr=reach(x),
        yerr=reach(y),
        fmt=marker,
        color=colour,
        markerfacecolor=colour if filled else "white",
        markersize=7,
        elinewidth=0.8,
        label=label,
    )
