"""Numbers about a reward on preference pairs. Pure functions of scores; a margin is the chosen minus the rejected
score.

A pair counts 1 where the margin is positive, 0 where it is negative and 0.5 at a tie: what a coin would make of it.
Labels [N], where there are some, are the probability that the chosen answer is preferred (1 without); a pair then
counts how often a label drawn from it would agree. Arrays [N] have one entry per pair. NaN marks a pair that a mean
leaves out.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from align.evaluation.bootstrap import LEVEL, RESAMPLES, all_alike, resample_weights

BLOCK = 5_000_000  # numbers of resampling weights held at once

# Bounds of chosen length / rejected length, and what the bin between two of them is called.
LENGTH_RATIOS = (0.5, 1 / 1.1, 1.1, 2.0)
LENGTH_BINS = (
    "chosen under half as long",
    "chosen shorter",
    "within 10 %",
    "chosen longer",
    "chosen over twice as long",
)
DISAGREEMENT_BINS = 4


def correct(margins: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """1, 0, or 0.5 at a tie [N]; p and 1 - p with labels p; NaN stays NaN."""
    return 0.5 + np.sign(margins) * ((1.0 if labels is None else labels) - 0.5)


def won(margins: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """As `correct`, but 0 at a tie: it is lost (RewardBench's rule)."""
    return np.where(margins == 0, 0.0, correct(margins, labels))


def bootstrap_means(
    columns: Mapping[str, np.ndarray], groups: Sequence, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """Bootstrap samples [resamples] of the mean of each column [N] over its entries that are not NaN.

    groups: one label per pair; pairs of one group (one prompt) are drawn together, because they are not independent.
    All columns see the same draws, so samples may be subtracted from each other. A draw that has no entry is NaN.
    """
    names = list(columns)
    values = np.stack([np.asarray(columns[name], dtype=np.float64) for name in names], axis=1)
    codes = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)[1]
    present = ~np.isnan(values)
    count = codes.max() + 1
    sums, sizes = np.zeros((count, len(names))), np.zeros((count, len(names)))
    np.add.at(sums, codes, np.where(present, values, 0))
    np.add.at(sizes, codes, present)
    block = max(1, BLOCK // count)
    parts = []
    with np.errstate(invalid="ignore"):  # 0 / 0
        for number, start in enumerate(range(0, resamples, block)):
            weights = resample_weights(count, resamples=min(block, resamples - start), seed=(seed, number))
            parts.append((weights @ sums) / (weights @ sizes))
    samples = np.concatenate(parts)
    return {name: samples[:, i] for i, name in enumerate(names)}


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[float | None, float | None]:
    """Percentiles of bootstrap samples; (None, None) where fewer than half of them have a value."""
    known = samples[~np.isnan(samples)]
    if known.size < samples.size / 2 or known.size == 0:
        return None, None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def estimate(values: np.ndarray, samples: np.ndarray, groups: Sequence | None = None) -> dict:
    """{"value", "low", "high", "pairs"} of the mean of values [N]; None where no pair is in it.

    groups: of a share, as in `bootstrap_means`: where it is 0 or 1, resamples are all alike, and tell nothing.
    """
    known = values[~np.isnan(values)]
    if known.size == 0:
        return {"value": None, "low": None, "high": None, "pairs": 0}
    low, high = interval(samples)
    if groups is not None and low is not None and high is not None:
        prompts = len({group for group, value in zip(groups, values, strict=True) if not np.isnan(value)})
        low, high = all_alike(known, prompts, low, high)
    return {"value": float(known.mean()), "low": low, "high": high, "pairs": int(known.size)}


# ---- length ---------------------------------------------------------------------------------------------------------


def length_bin(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """The number [N] of the bin of LENGTH_BINS that chosen / rejected length falls into."""
    return np.searchsorted(LENGTH_RATIOS, np.asarray(chosen) / np.maximum(rejected, 1), side="right")


def length_bias(chosen: np.ndarray, rejected: np.ndarray, chosen_length, rejected_length, labels=None) -> dict:
    """How scores [N] go with lengths [N].

    pearson, spearman: over all 2N answers. within_pair: of the differences within pairs, sum(ds dl) / sqrt(sum ds^2 sum
    dl^2), which does not depend on which answer is called chosen, nor on the prompt. prefers_longer: share of the pairs
    of different length in which the longer answer has the higher score (ties half); longer_is_chosen: in which the
    labels prefer it. None where it does not exist (all scores or all lengths equal).
    """
    chosen_length, rejected_length = np.asarray(chosen_length, float), np.asarray(rejected_length, float)
    scores, lengths = np.concatenate([chosen, rejected]), np.concatenate([chosen_length, rejected_length])
    ds, dl = chosen - rejected, chosen_length - rejected_length
    scale = np.sqrt((ds**2).sum() * (dl**2).sum())
    unequal = dl != 0
    longer = (np.sign(ds[unequal] * np.sign(dl[unequal])) + 1) / 2
    return {
        "pearson": pearson(scores, lengths),
        "spearman": pearson(ranks(scores), ranks(lengths)),
        "within_pair": float((ds * dl).sum() / scale) if scale > 0 else None,
        "prefers_longer": float(longer.mean()) if unequal.any() else None,
        "longer_is_chosen": float(correct(dl, labels)[unequal].mean()) if unequal.any() else None,
    }


# ---- agreement ------------------------------------------------------------------------------------------------------


def agreement(margins: np.ndarray) -> np.ndarray:
    """Share of pairs [K, K] that two of K scorers rank alike. margins: [K, N]. A tie agrees with a tie, and half with
    anything else."""
    signs = np.sign(margins)
    return np.array([[(1 - np.abs(a - b) / 2).mean() for b in signs] for a in signs])


def correlations(scores: np.ndarray) -> list[list[float | None]]:
    """Pearson correlations [K][K] of scores [K, M]."""
    return [[pearson(a, b) for b in scores] for a in scores]


def consensus(margins: np.ndarray) -> dict[str, float]:
    """Shares of the pairs that all of K members rank right, all rank wrong, or not all alike; and the share that all
    would get wrong if their errors were independent. margins: [K, N]."""
    right, wrong = margins > 0, margins < 0
    every, none = right.all(0), wrong.all(0)
    return {
        "all_right": float(every.mean()),
        "all_wrong": float(none.mean()),
        "split": float((~every & ~none).mean()),
        "all_wrong_if_independent": float(np.prod(wrong.mean(1))),
    }


def disagreement(margins: np.ndarray, outcome: np.ndarray) -> dict:
    """Whether the members' disagreement warns of errors.

    margins: [K, N], each member's on a scale of its own, and so divided by its root mean square first. outcome: [N],
    `correct` of the scorer that is warned. Three warnings are compared, each by the probability that a pair which is
    wrong has more of it than one which is right (0.5: no warning; None where all are right or all wrong):

        auroc           the variance over members, which grows with the margins themselves
        auroc_relative  the variance divided by the square of the mean margin
        auroc_margin    the smallness of the mean margin, which needs no ensemble: what the others have to beat

    bins: quarters of the pairs by variance.
    """
    unit = np.sqrt((margins**2).mean(1, keepdims=True))
    scaled = margins / np.where(unit > 0, unit, 1)
    variance, mean = scaled.var(0), np.abs(scaled.mean(0))
    relative = np.full(variance.shape, np.inf)
    np.divide(variance, mean**2, out=relative, where=mean > 0)
    warnings = {"auroc": variance, "auroc_relative": relative, "auroc_margin": -mean}
    order = np.argsort(variance, kind="stable")
    bins = [
        {"variance": float(variance[part].mean()), "accuracy": float(outcome[part].mean()), "pairs": len(part)}
        for part in np.array_split(order, DISAGREEMENT_BINS)
        if len(part)
    ]
    found = {name: auroc(values[outcome < 0.5], values[outcome > 0.5]) for name, values in warnings.items()}
    return {**found, "bins": bins}


# ---- ranks ----------------------------------------------------------------------------------------------------------


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """The correlation, or None where one of the two does not vary."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:  # their deviations from the mean may be rounding, and not 0
        return None
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale > 0 else None


def auroc(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """P(a positive value exceeds a negative one), ties half (Mann-Whitney); None where there are none of one kind."""
    if positive.size == 0 or negative.size == 0:
        return None
    order = ranks(np.concatenate([positive, negative]))[: positive.size].sum()
    return float((order - positive.size * (positive.size + 1) / 2) / (positive.size * negative.size))
