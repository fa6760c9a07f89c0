"""Calibration of pairwise rewards: whether a margin that says "70 % sure" is right 70 % of the time.

Bradley-Terry reads a margin m = s_chosen - s_rejected as P(chosen is better) = sigmoid(m). Seen without the label, the
model prefers the higher score with confidence sigmoid(|m|), from 0.5 to 1; it is right where m > 0, wrong where m < 0,
and half right at a tie.
"""

from dataclasses import dataclass

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """The reliability curve in B bins of equal width over [0.5, 1].

    edges: float [B + 1]. count: int [B], pairs per bin. confidence, accuracy: float [B], means over the pairs of the
    bin; NaN where it is empty. ece: the expected calibration error, sum_b count_b / N |accuracy_b - confidence_b|
    (Naeini et al. 2015; Guo et al. 2017, eq. 3), from 0 (calibrated) to 1.
    by_chance: the ece that a calibrated reward would show on average on so many pairs of this confidence, whose bins
    miss their accuracy by luck: sum_b sqrt(2 / pi sum_{i in b} c_i (1 - c_i)) / N, the normal distribution's.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float
    by_chance: float


def reliability(margins, bins: int = BINS, labels=None) -> Reliability:
    """The reliability curve of margins [N], chosen minus rejected score in the unit in which sigmoid(m) is meant.

    labels: probability that the chosen answer is preferred, [N]; 1 where absent.
    Raises ValueError for no margin or a non-finite one: the caller knows which rows they are.
    """
    margins = np.asarray(margins, dtype=np.float64)
    if margins.size == 0 or not np.isfinite(margins).all():
        raise ValueError(f"reliability needs finite margins and at least one, got {margins.size}")
    confidence, correct = pair_confidence(margins, labels)
    edges = np.linspace(0.5, 1.0, bins + 1)
    bin_index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)  # a bin holds its lower edge
    count = np.bincount(bin_index, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        mean_confidence = np.bincount(bin_index, confidence, bins) / count
        mean_accuracy = np.bincount(bin_index, correct, bins) / count
    gaps = np.abs(mean_accuracy - mean_confidence)
    ece = float(np.nansum(count * gaps) / margins.size)
    spread = np.bincount(bin_index, confidence * (1 - confidence), bins)  # of the number that is right, its variance
    by_chance = float(np.sqrt(2 / np.pi * spread).sum() / margins.size)
    return Reliability(edges, count, mean_confidence, mean_accuracy, ece, by_chance)


def pair_confidence(margins: np.ndarray, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, correct), float [N] each: sigmoid(|m|), and how often the label agrees: 1, 0 or, for a tie, 0.5;
    with labels p, p where m > 0 and 1 - p where m < 0."""
    lean = 0.5 if labels is None else np.asarray(labels, dtype=np.float64) - 0.5
    return 1 / (1 + np.exp(-np.abs(margins))), 0.5 + np.sign(margins) * lean


def best_scale(margins, labels=None) -> float | None:
    """The factor a > 0 that makes the labels of margins [N] most likely under sigmoid(a m): temperature 1 / a (Guo et
    al. 2017, section 4.2).

    It is what separates "not a probability at all" (a rule, an ensemble's aggregate) from "wrong by a constant factor".
    None where there is no such number: every pair is right (the likelihood grows without end) or the margins are
    wrong on average (a = 0 is best). labels: as in `reliability`.
    """
    margins = np.asarray(margins, dtype=np.float64)
    labels = np.ones(margins.shape) if labels is None else np.asarray(labels, dtype=np.float64)
    size = np.abs(margins).max(initial=0.0)
    if size == 0 or (margins * (labels - 0.5)).sum() <= 0 or (margins * (labels - (margins > 0))).sum() >= 0:
        return None
    unit = margins / size

    def slope(scale: float) -> float:
        """Derivative of the mean log-likelihood: positive below the optimum, negative above; monotone."""
        return float(np.mean(unit * (labels - 1 / (1 + np.exp(-np.clip(scale * unit, -700, 700))))))

    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2 / size
