"""Figures as the script of the pages draws them (templates/page_script.html.j2): plain values, to be written as JSON.

A figure is {x, y: labels of the axes, title, scale: of x, x_names, y_names: of whole numbers on an axis, x_reference,
y_reference: a line there, curves}; a curve {name, x, y, low, high, xlow, xhigh: intervals, labels: of its points,
dashed, hollow, plain: without points, line: False for points alone, group: curves of one group have one colour}.
"""

import math
from itertools import combinations
from typing import Any

import numpy as np

from align.evaluation.fits import gao_bon, gao_rl
from align.evaluation.rounding import settled, slack
from align.evaluation.thin import kept

AXES = {"kl": "KL (nats)", "kl_k3": "KL (nats, k3 estimate)", "step": "optimiser step"}
SD = "SD of the initial policy"
FORMS = {"bon": ("d(α − β d)", gao_bon), "rl": ("d(α − β ln d)", gao_rl)}


def _plain(values: Any) -> list:
    """Numbers as JSON has them: None for what is none."""
    return [None if value is None or not math.isfinite(value) else float(value) for value in values]


def score_curve(entry: dict, score: str, *, name: str, x: str = "x", scaled: bool = False, **look: Any) -> dict | None:
    """A score of an entry of the summary, with its interval; None where it was not measured. scaled: from 0 at the
    initial policy, in its standard deviations. Of many points those of `kept`."""
    if entry[score][0] is None:
        return None
    shown = kept(entry[score])
    zero, size = 0.0, 1.0
    if scaled:
        zero, size = entry["unit"][f"{score}_zero"], entry["unit"][f"{score}_sd"] or 1.0
    curve: dict[str, Any] = {"name": name, "x": _plain(entry[x][i] for i in shown), **look}
    for key, of in (("y", score), ("low", f"{score}_low"), ("high", f"{score}_high")):
        if of in entry:
            values = np.array([entry[of][i] for i in shown], dtype=np.float64)
            curve[key] = _plain((settled(values - zero, slack(values)) if scaled else values) / size)
    if "n" in entry:
        curve["labels"] = [f"n = {entry['n'][i]}" for i in shown]
    elif x != "step":
        curve["labels"] = [f"step {entry['step'][i]}" for i in shown]
    return curve


def _axis(entries: dict[str, dict]) -> dict[str, str]:
    of = next(iter(entries.values()))["x_of"]
    return {"x": AXES[of], "scale": "linear" if of == "step" else "√"}


def proxy_and_gold(entries: dict[str, dict]) -> list[dict]:
    """One figure per curve of the summary: proxy and gold in SD of the initial policy."""
    found = []
    for group, (name, entry) in enumerate(entries.items()):
        curves = [
            score_curve(entry, score, name=score, scaled=True, dashed=score == "proxy", group=group)
            for score in ("gold", "proxy")
        ]
        shown = [curve for curve in curves if curve]
        found.append({**_axis({name: entry}), "title": name, "y": f"score ({SD})", "y_reference": 0, "curves": shown})
    return found


def all_gold(entries: dict[str, dict]) -> dict:
    """Gold of all curves, in its own unit."""
    curves = [score_curve(entry, "gold", name=name, group=i) for i, (name, entry) in enumerate(entries.items())]
    return {**_axis(entries), "y": "gold score", "curves": [curve for curve in curves if curve]}


def by_step(entries: dict[str, dict]) -> list[dict]:
    """Proxy, gold and KL of runs against optimiser steps."""
    titles = {"proxy": f"proxy score ({SD})", "gold": "gold score", "kl": "KL (nats)"}
    found = []
    for key, title in titles.items():
        curves = [
            score_curve(entry, key, name=name, x="step", scaled=key == "proxy", group=i)
            for i, (name, entry) in enumerate(entries.items())
        ]
        shown = [curve for curve in curves if curve]
        if shown:
            found.append({"x": AXES["step"], "y": title, "curves": shown})
    return found


def fits(entries: dict[str, dict], fitted: dict[str, dict]) -> list[dict]:
    """One figure per curve: gold against d = sqrt(KL), measured and by both forms of Gao et al. up to a little beyond
    the last measurement."""
    found = []
    for name, entry in entries.items():
        forms = {form: fit for form, fit in (fitted.get(name) or {}).items() if form in FORMS and fit}
        kl = entry["kl_k3" if entry["x_of"] == "kl_k3" else "kl"]
        with_d = {**entry, "d": [math.sqrt(max(value, 0.0)) for value in kl]}
        measured = score_curve(with_d, "gold", name="measured", x="d", scaled=True, line=False)
        if not forms or measured is None:
            continue
        d = np.linspace(1e-3, 1.15 * max(with_d["d"]), 60)
        curves = [measured]
        for form, fit in forms.items():
            title, function = FORMS[form]
            y = _plain(function(d, fit["alpha"], fit["beta"]))
            curves.append({"name": title, "x": _plain(d), "y": y, "plain": True, "dashed": form == "bon"})
        found.append({"x": "d = √KL", "y": f"gold ({SD})", "title": name, "y_reference": 0, "curves": curves})
    return found


# ---- rewards on pairs ------------------------------------------------------------------------------------------------


def estimates(rows: list[tuple[str, dict[str, dict]]], names: list[str], *, x: str, reference: float) -> dict:
    """Estimates with intervals, a row of the figure for each of `rows`: (name, {reward: {value, low, high}})."""
    curves = []
    for number, name in enumerate(names):
        known = [(i, found[name]) for i, (_, found) in enumerate(rows) if found[name]["value"] is not None]
        shift = 0.6 * ((number + 0.5) / len(names) - 0.5)
        curve: dict[str, Any] = {"name": name, "line": False, "y": [i + shift for i, _ in known]}
        for key, of in (("x", "value"), ("xlow", "low"), ("xhigh", "high")):
            curve[key] = _plain(entry[of] for _, entry in known)
        curves.append(curve)
    return {
        "x": x,
        "y": "",
        "title": x,
        "y_names": [row[0] for row in rows],
        "x_reference": reference,
        "curves": curves,
    }


def by_length(series: dict[str, dict], baselines: dict[str, dict]) -> dict:
    """Accuracy by how much longer the chosen answer is."""
    curves, names = [], []
    for name, entry in {**series, **baselines}.items():
        bins = entry["by_length"]["bins"]
        names = [part["name"] for part in bins]
        known = [(i, part) for i, part in enumerate(bins) if part["value"] is not None]
        curve: dict[str, Any] = {"name": name, "x": [i for i, _ in known], "dashed": name in baselines}
        for key, of in (("y", "value"), ("low", "low"), ("high", "high")):
            curve[key] = _plain(part[of] for _, part in known)
        curve["labels"] = [f"{part['pairs']} pairs" for _, part in known]
        curves.append(curve)
    return {"x": "length of the chosen answer", "y": "accuracy", "x_names": names, "y_reference": 0.5, "curves": curves}


def calibration(series: dict[str, dict]) -> list[dict]:
    """One figure per reward: how often the preferred answer is right, against how sure the margin says it is."""
    found = []
    for name, entry in series.items():
        curves: list[dict] = [{"name": "true claim", "x": [0.5, 1], "y": [0.5, 1], "plain": True, "group": 7}]
        for number, (suffix, look) in enumerate((("", "as it is"), ("_at_best_scale", "at the best scale"))):
            curve, ece = entry["calibration"][f"curve{suffix}"], entry["calibration"][f"ece{suffix}"]
            if curve is None:
                continue
            shown = [i for i, count in enumerate(curve["count"]) if count]
            x, y = ([curve[part][i] for i in shown] for part in ("confidence", "accuracy"))
            labels = [f"{curve['count'][i]} pairs" for i in shown]
            name_of = f"{look}: ECE {ece:.3f}"
            curves.append({"name": name_of, "x": x, "y": y, "labels": labels, "dashed": bool(suffix), "group": number})
        found.append({"x": "confidence of the model", "y": "share that is right", "title": name, "curves": curves})
    return found


def margins(series: dict[str, dict]) -> list[dict]:
    """One figure per reward: how many pairs have a margin."""
    found = []
    for group, (name, entry) in enumerate(series.items()):
        counts, edges = entry["scores"]["margins"], entry["scores"]["margin_edges"]
        x = [edge for i in range(len(counts)) for edge in (edges[i], edges[i + 1])]  # a step for each bin
        y = [count for count in counts for _ in range(2)]
        curve = {"name": "pairs", "x": x, "y": y, "plain": True, "group": group}
        axis = "chosen minus rejected score"
        found.append({"x": axis, "y": "pairs", "title": name, "x_reference": 0, "curves": [curve]})
    return found


def disagreement(agreement: dict[str, dict]) -> dict:
    """Accuracy in quarters of the pairs, by how much an ensemble's members disagree."""
    curves = [
        {"name": name, "x": list(range(4)), "y": _plain(part["accuracy"] for part in entry["disagreement"]["bins"])}
        for name, entry in agreement.items()
        if "disagreement" in entry
    ]
    x = "disagreement of the members, quarters of the pairs"
    names = ["least", "less", "more", "most"]
    return {"x": x, "y": "accuracy", "x_names": names, "y_reference": 0.5, "curves": curves}


# ---- fronts ----------------------------------------------------------------------------------------------------------


def fronts(summary: dict) -> list[dict]:
    """One figure per pair of objectives, and the KL of every point: of the summary of `align front`."""
    found = []
    for x, y in combinations(summary["objectives"], 2):
        start = {"scores": summary["reference"]["scores"], "name": "reference policy"}
        curves = [_points("reference policy", [start], x, y, group=7)]
        for group, (name, run) in enumerate(summary["runs"].items()):
            for kind, points in _kinds(run["points"]).items():
                curves.append(_points(f"{name}{kind}", points, x, y, group=group, hollow=bool(kind)))
            best = sorted((p["scores"][x]["mean"], p["scores"][y]["mean"]) for p in run["points"] if p["non_dominated"])
            line = {"x": [a for a, _ in best], "y": [b for _, b in best], "plain": True, "group": group}
            curves.append({"name": f"{name}: not dominated", **line})
        found.append({"x": x, "y": y, "title": f"{y} against {x}", "curves": curves})
    curves = []
    for group, (name, run) in enumerate(summary["runs"].items()):
        for kind, points in _kinds(run["points"]).items():
            if not points[0]["weights"]:  # a single policy, which stands at no weight
                (kl,) = _plain(point["kl"]["mean"] for point in points)
                curves.append({"name": name, "x": [0, 1], "y": [kl, kl], "plain": True, "group": group})
                continue
            weights = [next(iter(point["weights"].values())) for point in points]
            curve = {"name": f"{name}{kind}", "x": weights, "line": False, "group": group, "hollow": bool(kind)}
            for key, of in (("y", "mean"), ("low", "low"), ("high", "high")):
                curve[key] = _plain(point["kl"][of] for point in points)
            curves.append(curve)
    cost = {"x": "weight of the first objective", "y": "KL to the reference (nats)", "title": "what it costs"}
    return [*found, {**cost, "curves": curves}]


def _kinds(points: list[dict]) -> dict[str, list[dict]]:
    """Trained points and soups apart, under what is added to the name of the run."""
    kinds = {"": [p for p in points if p["kind"] != "soup"], " (soups)": [p for p in points if p["kind"] == "soup"]}
    return {kind: found for kind, found in kinds.items() if found}


def _points(name: str, points: list[dict], x: str, y: str, **look: Any) -> dict:
    curve: dict[str, Any] = {"name": name, "line": False, "labels": [point["name"] for point in points], **look}
    for objective, (value, low, high) in ((x, ("x", "xlow", "xhigh")), (y, ("y", "low", "high"))):
        for key, of in ((value, "mean"), (low, "low"), (high, "high")):
            curve[key] = _plain(point["scores"][objective][of] for point in points)
    return curve
