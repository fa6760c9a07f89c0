"""Percentile bootstrap over prompts. Prompts are the independent unit: answers to one prompt are not.

Resamples are drawn and used up in tiles: all at once would take gigabytes from 100,000 prompts or evaluations on.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
TILE = 2_000_000  # numbers, 16 MB
IN_CACHE = 20_000  # numbers that are counted at once, at which counting is fastest

Seed = int | tuple[int, int]


def resample_weights(num_prompts: int, *, resamples: int = RESAMPLES, seed: Seed = 0) -> np.ndarray:
    """[resamples, P], rows sum to 1: `weights @ values` are means over prompts drawn with replacement.

    One set of weights used for several quantities keeps them paired: the same prompts in every quantity.
    """
    return _draw(np.random.default_rng(seed), num_prompts, resamples)


def weight_tiles(
    num_prompts: int, width: int = 1, *, resamples: int = RESAMPLES, seed: Seed = 0
) -> Iterator[np.ndarray]:
    """The rows of `resample_weights` in tiles [r, P]: neither they nor [r, width] have more than TILE numbers."""
    rng = np.random.default_rng(seed)
    rows = max(1, TILE // max(num_prompts, width))
    for start in range(0, resamples, rows):
        yield _draw(rng, num_prompts, min(rows, resamples - start))


def resampled_means(values: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: Seed = 0) -> list[np.ndarray]:
    """`resample_weights(P) @ v`, [resamples] or [resamples, K], of each v [P] or [P, K] of values, with a small K."""
    tiles = weight_tiles(len(values[0]), resamples=resamples, seed=seed)
    means = [[weights @ v for v in values] for weights in tiles]
    return [np.concatenate(of_one) for of_one in zip(*means, strict=True)]


def percentile_interval(samples: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """The (low, high) percentiles of bootstrap samples along axis 0.

    Samples may be infinite (a peak that some resamples do not have): percentiles are then samples themselves, never an
    interpolation between a number and infinity. NaN where a sample is.
    """
    samples, tail, last = np.asarray(samples), (1 - level) / 2, len(samples) - 1
    ends = [math.floor(last * tail), math.ceil(last * (1 - tail))]
    low, high = np.partition(samples, ends, axis=0)[ends]
    unknown = np.isnan(samples).any(0)
    return np.where(unknown, np.nan, low), np.where(unknown, np.nan, high)


def all_alike(shares: np.ndarray, prompts: int, low: float, high: float, level: float = LEVEL) -> tuple[float, float]:
    """The interval (low, high) of the mean of shares, with Clopper's and Pearson's bound where they are all 1 or all 0.

    A share of 83 % makes all of 20 prompts right in 2.5 % of draws, and no resample of them shows it.
    """
    reach = ((1 - level) / 2) ** (1 / prompts)
    if (shares == 1).all():
        return reach, 1.0
    return (0.0, 1 - reach) if (shares == 0).all() else (low, high)


def mean_interval(values: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the mean over prompts of values [P, K]: (low [K], high [K])."""
    return mean_intervals([values], seed=seed)[0]


def mean_intervals(values: Sequence[np.ndarray], *, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """`mean_interval` of several values [P, K], on the same resamples."""
    columns = max(1, TILE // RESAMPLES // len(values))
    ends: list[list] = [[] for _ in values]
    for start in range(0, values[0].shape[1], columns):
        samples = resampled_means([v[:, start : start + columns] for v in values], seed=seed)
        for of_one, drawn in zip(ends, samples, strict=True):
            of_one.append(percentile_interval(drawn))
    return [(np.concatenate([low for low, _ in of]), np.concatenate([high for _, high in of])) for of in ends]


def _draw(rng: np.random.Generator, num_prompts: int, resamples: int) -> np.ndarray:
    weights = np.empty((resamples, num_prompts))
    rows = max(1, IN_CACHE // num_prompts)
    for start in range(0, resamples, rows):
        part = weights[start : start + rows]
        drawn = rng.integers(num_prompts, size=part.shape)  # three times as fast as multinomial counts
        drawn += num_prompts * np.arange(len(part))[:, None]
        part[:] = np.bincount(drawn.ravel(), minlength=part.size).reshape(part.shape)
    weights /= num_prompts
    return weights
