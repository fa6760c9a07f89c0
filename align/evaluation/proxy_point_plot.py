"""The figure of a proxy point: the fitted surface, what of it is masked, the evaluations, the point."""

import itertools

import numpy as np

from align.evaluation.plots import COLOURS, panels, style
from align.evaluation.proxy_points import ProxyPoint
from align.evaluation.thin import kept


def plot_proxy_point(found: ProxyPoint):
    """One curve for one reward; for several one panel per pair, the others held at the point. A matplotlib Figure."""
    pairs = list(itertools.combinations(range(len(found.rewards)), 2))
    with style():
        figure, axes = panels(max(len(pairs), 1), above=0.35)
        if not pairs:
            _curve(axes.flat[0], found)
        for axis, (i, j) in zip(axes.flat, pairs, strict=False):
            _slice(figure, axis, found, i, j)
        figure.tight_layout()
    return figure


def _curve(axis, found: ProxyPoint) -> None:
    (x,), (name,) = found.axes, found.rewards
    axis.plot(x, np.where(found.allowed, found.surface, np.nan), color=COLOURS[0], label="fit")
    shown = kept(found.visited_gold.tolist())
    axis.scatter(found.visited[shown, 0], found.visited_gold[shown], s=14, color="#777777", label="evaluations")
    axis.axvspan(found.low[0], found.high[0], color=COLOURS[1], alpha=0.15, linewidth=0)
    axis.axvline(found.point[0], color=COLOURS[1], label=f"proxy point {found.point[0]:.3g}")
    axis.set(xlabel=name, ylabel="gold")
    axis.legend(fontsize=8.5)


def _slice(figure, axis, found: ProxyPoint, i: int, j: int) -> None:
    at = tuple(
        slice(None) if k in (i, j) else int(np.argmin(np.abs(found.axes[k] - found.point[k])))
        for k in range(len(found.rewards))
    )
    surface = np.where(found.allowed, found.surface, np.nan)[at]
    low, high = np.min(found.visited_gold), np.max(found.visited_gold)
    levels = np.linspace(low, max(high, found.gold), 15)
    drawn = axis.contourf(found.axes[i], found.axes[j], surface.T, levels=levels, cmap="viridis", extend="min")
    figure.colorbar(drawn, ax=axis, label="gold")
    shown = kept(found.visited_gold.tolist())
    colours = {"c": found.visited_gold[shown], "cmap": "viridis", "vmin": levels[0], "vmax": levels[-1]}
    axis.scatter(found.visited[shown, i], found.visited[shown, j], s=18, edgecolor="white", linewidth=0.6, **colours)
    spread = [[[found.point[k] - found.low[k]], [found.high[k] - found.point[k]]] for k in (i, j)]
    axis.errorbar(
        found.point[i], found.point[j], xerr=np.maximum(spread[0], 0), yerr=np.maximum(spread[1], 0),
        color=COLOURS[1], marker="*", markersize=14, capsize=3, label="proxy point, 95 %",
    )  # fmt: skip
    axis.set(xlabel=found.rewards[i], ylabel=found.rewards[j])
    axis.legend(fontsize=8.5, loc="lower right")
