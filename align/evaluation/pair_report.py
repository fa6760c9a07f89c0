"""The parts of reward_eval.json about preference pairs, from scores."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.evaluation import preference_metrics as metrics
from align.evaluation import rewardbench, rewardbench2
from align.evaluation.bootstrap import all_alike
from align.evaluation.calibration import best_scale, reliability
from align.evaluation.pair_sample import PairSample
from align.evaluation.pair_scores import PairScores
from align.evaluation.pairs import Pairs, prompt_keys, text_length
from align.evaluation.rewrite_sample import example
from align.evaluation.rounding import deviation
from align.evaluation.strict_json import finite

HISTOGRAM_BINS = 40
LONGER = "the longer answer"
SHARES = ("accuracy_before", "accuracy_after", "flips")
SHOWN = 3  # subsets named in a note


def describe_pairs(result: dict, sample: PairSample, seed: int) -> None:
    """Add everything about the pairs that every reward could score."""
    kept = sample.kept()
    pairs = sample.pairs.select(kept)
    scores = {name: scored.pairs.select(kept) for name, scored in sample.scored.items()}
    groups = prompt_keys(pairs)
    lengths = [np.array([text_length(text) for text in texts], float) for texts in (pairs.chosen, pairs.rejected)]
    for name, found in scores.items():
        scored = sample.scored[name]
        result["rewards"][name] = {
            **accuracy_entry(found, pairs, groups, lengths, seed),
            "scores": score_entry(found),
            "length": metrics.length_bias(found.chosen, found.rejected, lengths[0], lengths[1], pairs.labels),
            "calibration": calibration_entry(found.margins * scored.unit, scored.meaning, pairs.labels),
            "answers_per_second": scored.answers_per_second,
        }
        if not found.margins.any():
            result["notes"].append(f"{name} gives both answers of every pair the same score: it tells nothing apart")
        if found.members:
            names = [key.replace("/", " ") for key in found.members]
            members = np.stack(list(found.members.values()))
            result["agreement"][f"members of {name}"] = agreement_entry(names, members, pairs, found.margins)
    if len(scores) > 1:
        every = np.stack([[found.chosen, found.rejected] for found in scores.values()])
        result["agreement"]["rewards"] = agreement_entry(list(scores), every, pairs)
    longer = PairScores(lengths[0], lengths[1])
    result["baselines"][LONGER] = accuracy_entry(longer, pairs, groups, lengths, seed)
    result["comparisons"] = comparisons({n: s.margins for n, s in {**scores, LONGER: longer}.items()}, pairs, seed)
    if sample.rewritten:
        _describe_rewrites(result, sample, set(kept), seed)
    result["setup"] |= {
        "pairs": len(pairs),
        "dropped": sample.report.counts,
        "prompts": len(set(groups)),
        "texts as messages": pairs.chat,
        "soft labels": pairs.labels is not None,
        "rewardbench": pairs.rewardbench,
    }
    if pairs.rewardbench:
        _note_incomplete(result, "RewardBench", rewardbench.incomplete(Counter(pairs.subsets)))
    if pairs.places is not None:
        result["setup"]["rewardbench 2"] = True
        subsets = dict(zip(pairs.rows, pairs.subsets or (), strict=True))
        lacking = rewardbench.incomplete(Counter(subsets.values()), rewardbench2.PROMPTS, "prompts")
        _note_incomplete(result, "RewardBench 2", lacking)


def _note_incomplete(result: dict, name: str, lacking: list[str]) -> None:
    if lacking:
        more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
        result["notes"].append(f"not {name} as published: {', '.join(lacking[:SHOWN])}{more}")


def _describe_rewrites(result: dict, sample: PairSample, kept: set[int], seed: int) -> None:
    for name in sample.scored:
        result["rewards"][name]["rewrites"] = {}
    for rewritten in sample.rewritten:
        rewrite = rewritten.rewrite
        shown = [number for number, index in enumerate(rewritten.indices) if index in kept]
        indices = [rewritten.indices[number] for number in shown]
        originals = sample.pairs.select(indices)
        result["rewrites"][rewrite.name] = {
            "does": rewrite.does,
            "target": rewrite.target,
            "changed": len(indices),
            "example": example(originals, rewritten.pairs.select(shown)),
        }
        for name, scored in sample.scored.items():
            if indices:
                before, after = scored.pairs.select(indices), scored.rewrites[rewrite.name].select(shown)
                spread = result["rewards"][name]["scores"]["sd"]
                entry = rewrite_entry(before, after, spread, originals, seed)
                result["rewards"][name]["rewrites"][rewrite.name] = entry
        result["setup"]["pairs rewritten"] = rewritten.size


def accuracy_entry(
    scores: PairScores, pairs: Pairs, groups: Sequence[str], lengths: Sequence[np.ndarray], seed: int
) -> dict:
    """Accuracy of N pairs' scores, in all, by subset and by length, with intervals over prompts (`groups`).

    accuracy counts ties half, strict_accuracy as lost. lengths: of the chosen and of the rejected answers, [N] each.
    """
    margins = scores.margins
    correct, won = metrics.correct(margins, pairs.labels), metrics.won(margins, pairs.labels)
    subsets = np.array(pairs.subsets, dtype=object) if pairs.subsets is not None else None
    names = list(dict.fromkeys(pairs.subsets or ()))
    bins, longer = metrics.length_bin(*lengths), lengths[0] > lengths[1]
    shorter = lengths[0] < lengths[1]
    columns = {"accuracy": correct, "strict": won}
    columns |= {f"subset/{name}": np.where(subsets == name, correct, np.nan) for name in names}
    columns |= {f"won/{name}": np.where(subsets == name, won, np.nan) for name in names}
    columns |= {f"bin/{i}": np.where(bins == i, correct, np.nan) for i in range(len(metrics.LENGTH_BINS))}
    columns |= {"longer": np.where(longer, correct, np.nan), "shorter": np.where(shorter, correct, np.nan)}
    samples = metrics.bootstrap_means(columns, groups, seed=seed)

    benchmark = _rewardbench_entry(names, columns, samples) if pairs.rewardbench else None
    if pairs.places is not None:
        both = (scores.chosen, scores.rejected)
        prompts = rewardbench2.prompts_of(pairs.rows, pairs.places, groups, pairs.columns, both)
        benchmark = rewardbench2.scores_entry(prompts, seed)

    def entry(name: str) -> dict:
        return metrics.estimate(columns[name], samples[name], groups)

    return {
        "accuracy": entry("accuracy"),
        "strict_accuracy": entry("strict"),
        "ties": float((margins == 0).mean()),
        "subsets": {n: {"accuracy": entry(f"subset/{n}"), "strict_accuracy": entry(f"won/{n}")} for n in names},
        "rewardbench": benchmark,
        "by_length": {
            "bins": [{"name": name, **entry(f"bin/{i}")} for i, name in enumerate(metrics.LENGTH_BINS)],
            "chosen_longer": entry("longer"),
            "chosen_shorter": entry("shorter"),
        },
    }


def comparisons(margins: dict[str, np.ndarray], pairs: Pairs, seed: int) -> dict:
    """Accuracy of each but the first minus that of the first ("base"), with paired intervals. margins: [N] by name."""
    base, *others = margins
    columns = {name: metrics.correct(values, pairs.labels) for name, values in margins.items()}
    samples = metrics.bootstrap_means(columns, prompt_keys(pairs), seed=seed)
    differences = {
        name: metrics.estimate(columns[name] - columns[base], samples[name] - samples[base]) for name in others
    }
    return {"base": base, "accuracy_minus_base": differences}


def _rewardbench_entry(names: list[str], columns: dict, samples: dict) -> dict:
    shares = {name: float(np.nanmean(columns[f"won/{name}"])) for name in names}
    sections = rewardbench.section_scores(shares)
    drawn = rewardbench.section_scores({name: samples[f"won/{name}"] for name in names})
    score = rewardbench.overall_score(sections)
    entry: dict[str, Any] = {"version": 1, "sections": {}, "score": None}
    for section, value in sections.items():
        count = sum(int((~np.isnan(columns[f"won/{n}"])).sum()) for n in names if n in rewardbench.WEIGHTS[section])
        entry["sections"][section] = _share(value, drawn[section], count)
    if score is not None:
        total = sum(section["pairs"] for section in entry["sections"].values())
        entry["score"] = _share(score, rewardbench.overall_score(drawn), total)
    return entry


def _share(value: float, samples: np.ndarray, pairs: int) -> dict:
    low, high = metrics.interval(samples)
    if low is not None and high is not None:
        low, high = all_alike(np.array([value]), pairs, low, high)
    return {"value": value, "low": low, "high": high, "pairs": pairs}


def score_entry(scores: PairScores) -> dict:
    """Where the scores lie: means, deviations, and histograms of both answers' scores and of the margins."""
    edges = np.histogram_bin_edges(scores.both, HISTOGRAM_BINS)
    margins, margin_edges = np.histogram(scores.margins, HISTOGRAM_BINS)
    return {
        "mean_chosen": scores.chosen.mean(),
        "mean_rejected": scores.rejected.mean(),
        "sd": deviation(scores.both),
        "mean_margin": scores.margins.mean(),
        "sd_margin": deviation(scores.margins),
        "edges": edges,
        "chosen": np.histogram(scores.chosen, edges)[0],
        "rejected": np.histogram(scores.rejected, edges)[0],
        "margin_edges": margin_edges,
        "margins": margins,
    }


def calibration_entry(margins: np.ndarray, unit: str, labels: np.ndarray | None) -> dict:
    """Calibration of sigmoid(margin), and of sigmoid(scale x margin) with the scale that fits these labels best."""
    scale = best_scale(margins, labels)
    rescaled = None if scale is None else reliability(scale * margins, labels=labels)
    curve = reliability(margins, labels=labels)
    return {
        "unit": unit,
        "ece": curve.ece,
        "ece_by_chance": curve.by_chance,
        "best_scale": scale,
        "ece_at_best_scale": None if rescaled is None else rescaled.ece,
        "curve": _curve(curve),
        "curve_at_best_scale": None if rescaled is None else _curve(rescaled),
    }


def _curve(curve) -> dict:
    return {
        "edges": curve.edges,
        "count": curve.count,
        "confidence": [finite(float(x)) for x in curve.confidence],
        "accuracy": [finite(float(x)) for x in curve.accuracy],
    }


def rewrite_entry(before: PairScores, after: PairScores, spread: float, pairs: Pairs, seed: int) -> dict:
    """What one rewrite does to the pairs that it changes.

    before, after: scores of these pairs. accuracy_before, accuracy_after: on these pairs; change: after - before.
    flips: share of the pairs whose ranking is another (a tie that begins or ends included). score_change: mean over
    both answers of after - before, in standard deviations `spread` of the reward's scores; score_shift: the mean of
    its size without the sign. Pairs that could not be scored are left out.
    """
    old, new = (metrics.correct(scores.margins, pairs.labels) for scores in (before, after))
    old = np.where(np.isnan(new), np.nan, old)
    flips = np.sign(before.margins) != np.sign(after.margins)
    differences = np.stack([after.chosen - before.chosen, after.rejected - before.rejected])
    columns = {
        "accuracy_before": old,
        "accuracy_after": new,
        "change": new - old,
        "flips": np.where(np.isnan(new), np.nan, flips),
    }
    if spread > 0:
        columns["score_change"] = differences.mean(0) / spread
        columns["score_shift"] = np.abs(differences).mean(0) / spread
    groups = prompt_keys(pairs)
    samples = metrics.bootstrap_means(columns, groups, seed=seed)
    entry = {
        name: metrics.estimate(values, samples[name], groups if name in SHARES else None)
        for name, values in columns.items()
    }
    return {"score_change": None, "score_shift": None, **entry}


def agreement_entry(names: list[str], scores: np.ndarray, pairs: Pairs, margins: np.ndarray | None = None) -> dict:
    """How K scorers agree. scores: [K, 2, N], chosen and rejected. margins: [N], of the ensemble that they make up."""
    differences = scores[:, 0] - scores[:, 1]
    accuracy = metrics.correct(differences, pairs.labels).mean(1)
    likelier = 1.0 if pairs.labels is None else np.where(pairs.labels < 0.5, -1.0, 1.0)
    entry = {
        "names": names,
        "accuracy": accuracy,
        "same_ranking": metrics.agreement(differences),
        "score_correlation": metrics.correlations(scores.reshape(len(names), -1)),
        **metrics.consensus(differences * likelier),
    }
    if margins is not None:
        entry["disagreement"] = metrics.disagreement(differences, metrics.correct(margins, pairs.labels))
    return entry


def rank_correlation(scores: Sequence[np.ndarray], gold: Sequence[np.ndarray], seed: int) -> dict:
    """Spearman's correlation with gold within a prompt, mean over the prompts where both vary."""
    found = [metrics.pearson(metrics.ranks(s), metrics.ranks(g)) for s, g in zip(scores, gold, strict=True)]
    values = np.array([np.nan if value is None else value for value in found], dtype=np.float64)
    samples = metrics.bootstrap_means({"value": values}, range(len(values)), seed=seed)["value"]
    return metrics.estimate(values, samples)
