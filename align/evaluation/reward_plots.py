"""Figures of reward_eval.json (matplotlib, no display needed). Every function takes the result of `evaluate_reward`."""

import numpy as np

from align.evaluation.plots import COLOURS, MARKERS, panels, style

GREY = "#777777"


def plot_accuracy(result: dict):
    """Accuracy of each reward and of the length baseline, in all, by section or by subset, with 95 % intervals."""
    series = {**_rewards(result), **result["baselines"]}
    rows = accuracy_rows(series)
    chance = by_chance(series)
    return _dots(rows, list(series), xlabel="accuracy", reference=chance, least=0.1, baselines=result["baselines"])


def plot_rewrites(result: dict):
    """The change of accuracy under each rewrite, with paired 95 % intervals."""
    series = _rewards(result)
    return _dots(rewrite_rows(result), list(series), xlabel="change of accuracy", reference=0.0, least=0.02)


def plot_length(result: dict):
    """Accuracy by how much longer the chosen answer is; a reward that follows length climbs with the baseline."""
    with style():
        figure, axes = panels(1, width=10, height=3.6, above=0.15)
        axis = axes[0, 0]
        for number, (name, entry) in enumerate({**_rewards(result), **result["baselines"]}.items()):
            bins = entry["by_length"]["bins"]
            shown = [i for i, part in enumerate(bins) if part["value"] is not None]
            baseline = name in result["baselines"]
            colour, marker = (GREY, "") if baseline else _look(number)
            axis.plot(
                shown,
                [bins[i]["value"] for i in shown],
                "--" if baseline else "-",
                color=colour,
                marker=marker,
                label=name,
            )
            known = [i for i in shown if bins[i]["low"] is not None]
            if not baseline:
                low, high = ([bins[i][side] for i in known] for side in ("low", "high"))
                axis.fill_between(known, low, high, color=colour, alpha=0.16, linewidth=0)
        axis.axhline(0.5, color="#BBBBBB", linewidth=1, zorder=0)
        labels = [f"{part['name']}\n({part['pairs']} pairs)" for part in bins]
        axis.set_xticks(range(len(bins)), labels=labels, fontsize=8.5)
        axis.set_ylabel("accuracy")
        axis.set(xlim=(-0.45, len(bins) - 0.55), ylim=(-0.03, 1.03))
        axis.legend(fontsize=8.5)
        return figure


def plot_calibration(result: dict):
    """One panel per reward: how often the preferred answer is right, against how sure the margin says it is."""
    series = _rewards(result)
    with style():
        figure, axes = panels(len(series), above=0.32)
        for number, (axis, (name, entry)) in enumerate(zip(axes.flat, series.items(), strict=False)):
            axis.plot([0.5, 1], [0.5, 1], color="#BBBBBB", linewidth=1)
            calibration = entry["calibration"]
            looks = {"": ("as it is", "-", _look(number)[0]), "_at_best_scale": ("at the best scale", "--", GREY)}
            for suffix, (label, line, colour) in looks.items():
                curve, ece = calibration[f"curve{suffix}"], calibration[f"ece{suffix}"]
                if curve is None:
                    continue
                shown = [i for i, count in enumerate(curve["count"]) if count]
                points = [[curve[part][i] for i in shown] for part in ("confidence", "accuracy")]
                sizes = 12 + 160 * np.array([curve["count"][i] for i in shown]) / sum(curve["count"])
                axis.plot(*points, line, color=colour, label=f"{label}: ECE {ece:.3f}", linewidth=1.5)
                axis.scatter(*points, s=sizes, color=colour, zorder=3)
            axis.set(xlim=(0.48, 1.02), ylim=(-0.03, 1.03), xlabel="confidence of the model", title=name)
            axis.legend(fontsize=8.5, loc="lower right")
        _hide_rest(axes, len(series))
        for axis in axes[:, 0]:
            axis.set_ylabel("share that is right")
        return figure


def plot_scores(result: dict):
    """One panel per reward: the distribution of its margins; right of 0 it agrees with the labels."""
    series = _rewards(result)
    with style():
        figure, axes = panels(len(series), above=0.32)
        for number, (axis, (name, entry)) in enumerate(zip(axes.flat, series.items(), strict=False)):
            scores = entry["scores"]
            axis.stairs(scores["margins"], scores["margin_edges"], fill=True, color=_look(number)[0], alpha=0.75)
            axis.axvline(0, color="#333333", linewidth=1)
            axis.set(xlabel="chosen minus rejected score", title=name)
        _hide_rest(axes, len(series))
        for axis in axes[:, 0]:
            axis.set_ylabel("pairs")
        return figure


def plot_disagreement(result: dict):
    """Accuracy of each ensemble in quarters of the pairs, by how much its members disagree."""
    series = {name: entry for name, entry in result["agreement"].items() if "disagreement" in entry}
    with style():
        figure, axes = panels(1, above=0.15)
        axis = axes[0, 0]
        for number, (name, entry) in enumerate(series.items()):
            colour, marker = _look(number)
            bins = entry["disagreement"]["bins"]
            axis.plot(range(len(bins)), [b["accuracy"] for b in bins], "-", color=colour, marker=marker, label=name)
        axis.axhline(0.5, color="#BBBBBB", linewidth=1, zorder=0)
        axis.set_xticks(range(4), labels=["least", "less", "more", "most"])
        axis.set(xlabel="disagreement of the members, quarters of the pairs", ylabel="accuracy")
        axis.legend(fontsize=8.5)
        return figure


def _rewards(result: dict) -> dict[str, dict]:
    """The rewards with numbers on pairs."""
    return {name: entry for name, entry in result["rewards"].items() if "accuracy" in entry}


def rewrite_rows(result: dict) -> list[tuple[str, dict[str, dict]]]:
    """The change of accuracy of each reward under each rewrite that changes anything."""
    series = _rewards(result)
    return [
        (name, {reward: entry["rewrites"][name]["change"] for reward, entry in series.items()})
        for name, rewrite in result["rewrites"].items()
        if rewrite["changed"]
    ]


def by_chance(series: dict[str, dict]) -> float:
    """The accuracy of a coin: of RewardBench 2 that of a die, as a right answer has three wrong ones beside it."""
    benchmark = next(iter(series.values()))["rewardbench"]
    return 0.25 if benchmark is not None and benchmark["version"] == 2 else 0.5


def accuracy_rows(series: dict[str, dict]) -> list[tuple[str, dict[str, dict]]]:
    """Accuracies of each reward: in all, by section of RewardBench, by its second version's subsets, or by subset."""
    rows = [("all pairs", {name: entry["accuracy"] for name, entry in series.items()})]
    first = next(iter(series.values()))
    if first["rewardbench"] is not None:
        if first["rewardbench"]["score"] is not None:
            title = "RewardBench" if first["rewardbench"]["version"] == 1 else "RewardBench 2"
            rows = [(title, {name: entry["rewardbench"]["score"] for name, entry in series.items()})]
        for section in first["rewardbench"]["sections"]:
            rows.append((section, {name: e["rewardbench"]["sections"][section] for name, e in series.items()}))
        return rows
    for subset in first["subsets"]:
        rows.append((subset, {name: entry["subsets"][subset]["accuracy"] for name, entry in series.items()}))
    return rows


def _dots(rows: list[tuple[str, dict]], names: list[str], *, xlabel: str, reference: float, least: float, baselines=()):
    """Estimates with intervals on horizontal lines: one line per row, one colour per name. least: of the axis, on both
    sides of the reference, so that a difference of nothing does not fill the panel."""
    with style():
        height = max(0.9, 0.3 * len(rows) * max(1.0, 0.45 * len(names)))
        columns = 4
        legend = -(-len(names) // columns)
        figure, axes = panels(1, width=10, height=height, above=0.2 + 0.2 * legend)
        axis = axes[0, 0]
        for number, name in enumerate(names):
            colour, marker = _look(number) if name not in baselines else (GREY, "|")
            shift = 0.6 * ((number + 0.5) / len(names) - 0.5)
            for index, (_, estimates) in enumerate(rows):
                found = estimates[name]
                if found["value"] is None:
                    continue
                label = name if index == 0 else None
                axis.plot(found["value"], index + shift, marker, color=colour, markersize=6, label=label, zorder=3)
                if found["low"] is not None:
                    axis.plot([found["low"], found["high"]], [index + shift] * 2, "-", color=colour, linewidth=1.6)
        axis.axvline(reference, color="#999999", linewidth=1, zorder=0)
        axis.set_yticks(range(len(rows)), labels=[row[0] for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, reference - least), max(high, reference + least))
        axis.set_xlabel(xlabel)
        axis.legend(fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
        longest = max(len(row[0]) for row in rows)
        figure.subplots_adjust(left=min(0.4, (0.5 + 0.075 * longest) / 10))
        return figure


def _look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _hide_rest(axes, used: int) -> None:
    for axis in axes.flat[used:]:
        axis.set_axis_off()
