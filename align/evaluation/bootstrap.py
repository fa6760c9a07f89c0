"""Percentile bootstrap over prompts. Prompts are the independent unit: answers to one prompt are not."""

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


def resample_weights(num_prompts: int, *, resamples: int = RESAMPLES, seed: int | tuple[int, int] = 0) -> np.ndarray:
    """[resamples, P], rows sum to 1: `weights @ values` are means over prompts drawn with replacement.

    One set of weights used for several quantities keeps them paired: the same prompts in every quantity.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(num_prompts, size=(resamples, num_prompts))  # three times as fast as multinomial counts
    drawn += num_prompts * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * num_prompts)
    return counts.reshape(resamples, num_prompts) / num_prompts


def percentile_interval(samples: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """The (low, high) percentiles of bootstrap samples along axis 0.

    Samples may be infinite (a peak that some resamples do not have): percentiles are then samples themselves, never an
    interpolation between a number and infinity.
    """
    tail = (1 - level) / 2
    low = np.quantile(samples, tail, axis=0, method="lower")
    high = np.quantile(samples, 1 - tail, axis=0, method="higher")
    return low, high


def mean_interval(values: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the mean over prompts of values [P, K]: (low [K], high [K])."""
    return percentile_interval(resample_weights(len(values), seed=seed) @ values)
