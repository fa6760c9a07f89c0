"""What must not be decided by the last digit of a mean: whether scores differ, and which is the highest."""

import numpy as np

ROUNDING = 1e-12  # of the largest score: less is no difference


def deviation(values: np.ndarray) -> float:
    """The standard deviation; 0 of equal values, of which numpy's may be 1e-17."""
    values = np.asarray(values)
    if (values == values.flat[0]).all():
        return 0.0
    _, exponent = np.frexp(np.abs(values).max())  # scaled by it, exactly: squares of 1e200 and 1e-200 do not exist
    return float(np.ldexp(np.ldexp(values, -exponent).std(), exponent))


def slack(scores: np.ndarray) -> float:
    """By how much scores that are equal may differ."""
    return ROUNDING * float(np.abs(scores).max())


def settled(differences, slack: float):
    """Differences, 0 where they are rounding."""
    return np.where(np.abs(differences) <= slack, 0.0, differences)


def first_highest(means: np.ndarray, slack: float) -> np.ndarray:
    """The index along the last axis of the highest mean, of equal ones the first."""
    return np.asarray(means >= means.max(-1, keepdims=True) - slack).argmax(-1)
