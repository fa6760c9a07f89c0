"""Figures of a summary's curves (matplotlib, no display needed). Every function takes entries of `summary.json` by
name.

Gold is solid and the proxy dashed everywhere; a ring marks the gold peak; bands are 95 % intervals over prompts. KL
has a square-root scale, because scores are smooth in sqrt(KL) and not in KL.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from align.evaluation.fits import FUNCTIONS
from align.evaluation.rounding import settled, slack
from align.evaluation.thin import kept

# Okabe and Ito's colours: told apart with any colour vision, and not by colour alone (markers differ too).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
PROXY_COLOUR, GOLD_COLOUR = "#D55E00", "#0072B2"
FORM_LABELS = {"bon": "d(α − β d)", "rl": "d(α − β ln d)"}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,  # names of runs and rewards may have dollar signs
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": True,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "lines.linewidth": 2,
    "svg.fonttype": "path",
    "svg.hashsalt": "align",
    "figure.dpi": 110,
}
SD_LABEL = "score (SD of the initial policy)"
KL_LABEL = "KL from the initial policy (nats, √ scale)"


@contextmanager
def style():
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def plot_proxy_and_gold(entries: dict[str, dict], kind: str):
    """One panel per curve: what the proxy says (dashed) and what is true (solid), both from 0 in SD of the initial
    policy.

    entries: `summary["best_of_n"]` or `summary["runs"]`; kind: which of the two. Returns a matplotlib Figure.
    """
    with style():
        figure, axes = panels(len(entries), sharey=True, above=0.55 if kind == "best_of_n" else 0.32)
        for axis, (name, entry) in zip(axes.flat, entries.items(), strict=False):
            for score, colour, line in (("proxy", PROXY_COLOUR, "--"), ("gold", GOLD_COLOUR, "-")):
                _band(axis, entry, "x", score, colour, line, label=_label(score, entry), scaled=True)
            _kl_axis(axis, entry, kind)
            _mark_peak(axis, entry, "x", GOLD_COLOUR, scaled=True, line=True)
            axis.axhline(0, color="#BBBBBB", linewidth=1, zorder=0)
            axis.set_title(name, pad=22 if kind == "best_of_n" else 8)
            axis.legend(loc="upper left", fontsize=8.5, handlelength=2.4)
        for axis in axes.flat[len(entries) :]:
            axis.set_axis_off()
        for axis in axes[:, 0]:
            axis.set_ylabel(SD_LABEL)
        return figure


def plot_gold(entries: dict[str, dict], kind: str):
    """The gold scores of several curves in one panel, in their own unit, against what `x_of` of the entries says."""
    with style():
        figure, axes = panels(1, width=10, height=3.6, above=0.32 if kind == "best_of_n" else 0.15)
        axis = axes[0, 0]
        for number, (name, entry) in enumerate(with_gold(entries).items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            _band(axis, entry, "x", "gold", colour, "-", label=name, marker=marker)
            _mark_peak(axis, entry, "x", colour)
        _kl_axis(axis, max(entries.values(), key=lambda entry: max(entry["x"])), kind)
        axis.set_ylabel("gold score")
        axis.legend(title="chosen by" if kind == "best_of_n" else "trained on", alignment="left")
        return figure


def plot_steps(entries: dict[str, dict]):
    """Proxy, gold and KL of runs against optimiser steps, three panels with one colour per run."""
    with style():
        figure, axes = panels(3, above=0.32)
        for axis, key in zip(axes.flat, ("proxy", "gold", "kl"), strict=True):
            for number, (name, entry) in enumerate(entries.items()):
                if entry[key][0] is None:
                    continue
                colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
                scaled = key == "proxy"  # proxies of different runs have different units
                _band(
                    axis, entry, "step", key, colour, "--" if scaled else "-", label=name, marker=marker, scaled=scaled
                )
                if key == "gold":
                    _mark_peak(axis, entry, "step", colour)
            axis.set_title({"proxy": "proxy score (SD from start)", "gold": "gold score", "kl": "KL (nats)"}[key])
            axis.set_xlabel("optimiser step")
            if key == "proxy":
                axis.legend(fontsize=8.5)
        return figure


def plot_fits(entries: dict[str, dict], fits: dict[str, dict], kind: str):
    """Measured gold scores against d = sqrt(KL) and both forms of Gao et al.; dotted where a fit extrapolates."""
    with style():
        shown = {name: entry for name, entry in with_gold(entries).items() if name in fits}
        figure, axes = panels(len(shown), sharey=True, above=0.32)
        own = "bon" if kind == "best_of_n" else "rl"
        for axis, (name, entry) in zip(axes.flat, shown.items(), strict=False):
            d = np.sqrt(np.maximum(entry["kl_k3" if entry["x_of"] == "kl_k3" else "kl"], 0))
            score = _scaled(entry, "gold", entry["gold"])
            low, high = (_scaled(entry, "gold", entry.get(f"gold_{side}", entry["gold"])) for side in ("low", "high"))
            errors, some = np.maximum([score - low, high - score], 0), kept(entry["gold"])
            look: dict[str, Any] = {"fmt": "o", "color": "#333333", "markersize": 4, "linewidth": 1}
            axis.errorbar(d[some], score[some], yerr=errors[:, some], label="measured", **look)
            for form, colour in (("bon", "#009E73"), ("rl", "#CC79A7")):
                fit = fits[name][form]
                if fit is None:
                    continue
                curve = np.linspace(1e-3, 1.15 * d.max(), 300)
                inside = curve <= d.max()
                values = FUNCTIONS[form](curve, fit["alpha"], fit["beta"])
                width = 2.4 if form == own else 1.4
                label = f"{FORM_LABELS[form]}{' (this kind)' if form == own else ''}"
                line: dict[str, Any] = {"color": colour, "linewidth": width, "zorder": 4}  # above many measured points
                axis.plot(curve[inside], values[inside], label=label, **line)
                axis.plot(curve[~inside], values[~inside], ":", **line)
                if fit["peak_d"] is not None and fit["peak_d"] <= curve[-1]:
                    axis.plot(fit["peak_d"], fit["peak_score"], "*", color=colour, markersize=11, zorder=5)
            axis.axhline(0, color="#BBBBBB", linewidth=1, zorder=0)
            axis.set_title(name)
            axis.set_xlabel("d = √KL")
            axis.legend(fontsize=8.5, loc="best")
        for axis in axes.flat[len(shown) :]:
            axis.set_axis_off()
        axes[0, 0].set_ylabel("gold " + SD_LABEL)
        return figure


def save_figure(figure, stem: str | Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`; returns the two paths."""
    paths = [Path(f"{stem}.png"), Path(f"{stem}.svg")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure.savefig(paths[1], metadata={"Date": None})
        figure.savefig(paths[0], dpi=160)
    return paths


def with_gold(entries: dict[str, dict]) -> dict[str, dict]:
    return {name: entry for name, entry in entries.items() if entry["gold"] and entry["gold"][0] is not None}


def _scaled(entry: dict, score: str, values) -> np.ndarray:
    """Scores from zero at the initial policy, in its standard deviations (unscaled where that is zero)."""
    unit, values = entry["unit"], np.asarray(values, dtype=np.float64)
    return settled(values - unit[f"{score}_zero"], slack(values)) / (unit[f"{score}_sd"] or 1.0)


def panels(count: int, *, sharey=False, above: float, width: float | None = None, height: float = 2.8):
    """A figure of `count` equal panels and its axes [rows, columns]; `above`: inches for titles over each panel.

    Margins are set in inches: matplotlib's layout engines take as long as the drawing.
    """
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)  # three would leave the fourth alone
    rows = -(-count // columns)
    width = width or {1: 6.5, 2: 10.5, 3: 12.6}[columns]
    left, right, below, between = 0.8, 0.2, 0.55, 0.18 if sharey else 0.62
    figure = Figure(figsize=(width, rows * (height + below + above)))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    panel = (width - left - right - (columns - 1) * between) / columns
    total = figure.get_figheight()
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=below / total,
        top=1 - above / total,
        wspace=between / panel,
        hspace=(above + below) / height,
    )
    return figure, axes


def _label(score: str, entry: dict) -> str:
    name = entry[f"{score}_name"]
    return score if name in (score, None) else f"{score} ({name})"


def _band(
    axis, entry: dict, x: str, score: str, colour: str, line: str, *, label: str, marker="", scaled=False
) -> None:
    if entry[score][0] is None:
        return
    keys, shown = [key for key in (score, f"{score}_low", f"{score}_high") if key in entry], kept(entry[score])
    values = [(_scaled(entry, score, entry[key]) if scaled else np.asarray(entry[key]))[shown] for key in keys]
    at, every = np.asarray(entry[x])[shown], max(len(shown) // 12, 1)  # markers on every point of a long curve hide it
    axis.plot(at, values[0], line, color=colour, label=label, marker=marker, markersize=4.5, markevery=every)
    if len(values) == 3:
        axis.fill_between(at, values[1], values[2], color=colour, alpha=0.16, linewidth=0)


def _mark_peak(axis, entry: dict, x: str, colour: str, *, scaled=False, line=False) -> None:
    if entry.get("peak") is None:
        return
    point = entry["peak"]["peak"]
    gold = _scaled(entry, "gold", point["gold"]) if scaled else point["gold"]
    axis.plot(
        point[x],
        gold,
        "o",
        markersize=10,
        markerfacecolor="white",
        markeredgecolor=colour,
        markeredgewidth=2.2,
        zorder=6,
        clip_on=False,
    )
    if line and point["index"] != entry["peak"]["end"]["index"]:
        axis.axvline(point[x], color=colour, linewidth=1, linestyle=":", zorder=1)
        where = f"n = {point['n']}" if "n" in point else f"KL {point['kl']:.2g}"
        right = axis.transAxes.inverted().transform(axis.transData.transform((point[x], 0)))[0] > 0.55
        axis.annotate(
            f"gold peak, {where}",
            (point[x], 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if right else 5, 0),
            textcoords="offset points",
            horizontalalignment="right" if right else "left",
            fontsize=8.5,
            color=colour,
        )


def _kl_axis(axis, entry: dict, kind: str) -> None:
    """A square-root KL axis from 0, or plain steps (`x_of`); for best-of-n with n on top."""
    if entry["x_of"] == "step":
        axis.set_xlabel("optimiser step")
        return
    largest = max(max(entry["x"]), axis.dataLim.x1, 1e-6)
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set_xlim(0, largest * 1.04)
    ticks = _sqrt_ticks(largest * 1.04)
    axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(KL_LABEL if entry["x_of"] == "kl" else KL_LABEL.replace("nats", "nats, k3 estimate"))
    if kind == "best_of_n":
        # A second axis would say the same and take as long to draw as the whole panel.
        pairs = list(zip(entry["n"], entry["kl"], strict=True))
        pairs = pairs[:1] + pairs[1::2] if len(pairs) > 7 else pairs
        above = axis.get_xaxis_transform()
        for n, kl in pairs:
            label, side = ("n = 1", "left") if n == 1 else (str(n), "center")
            axis.text(kl, 1.025, label, transform=above, horizontalalignment=side, fontsize=9, color="#555555")
        axis.plot([kl for _, kl in pairs], [1.0] * len(pairs), "|", transform=above, color="#666666", clip_on=False)


def _sqrt_ticks(largest: float) -> list[float]:
    """Round numbers from 0, at least a tenth of the axis apart on a square-root scale, chosen from the right."""
    ticks = [np.inf]
    for exponent in range(int(np.floor(np.log10(largest))), -6, -1):
        for factor in (8, 6, 5, 4, 3, 2, 1.5, 1):
            tick = factor * 10.0**exponent
            position, right = np.sqrt(tick / largest), np.sqrt(ticks[-1] / largest)
            if tick <= largest and 0.1 < position < right - 0.1:
                ticks.append(tick)
    return [0.0, *ticks[:0:-1]]
