"""Best-of-n without sampling it: the unbiased estimator over all subsets of N scored answers (Nakano et al. 2021,
"WebGPT", appendix I; Gao et al. 2022, section 2; Coste et al. 2023, section 4). numpy, float64."""

from collections.abc import Sequence

import numpy as np

from align.errors import DataError

ROWS_AT_ONCE = 64  # bounds the memory of the sorted copies: 64 prompts x 12,600 answers is 6 MB each


def bon_kl(n):
    """KL(best-of-n || base) = ln n - (n-1)/n in nats, for a number or an array of n >= 1.

    Exact when the n answers are distinct and untied in the selection score; with repeated answers or ties the true
    KL is smaller, so this is an upper bound.
    """
    n = np.asarray(n, dtype=np.float64)
    if np.any(n < 1):
        raise DataError("best-of-n needs n >= 1")
    kl = np.log(n) - (n - 1) / n
    return float(kl) if kl.ndim == 0 else kl


def bon_weights(N: int, n: int) -> np.ndarray:
    """[N]: probability that the i-th smallest of N answers is the best of a random subset of n.

    w_i = C(i-1, n-1) / C(N, n).

    Backward recursion w_N = n/N, w_{i-1} = w_i (i-n)/(i-1): no big integers, no overflow, relative error about
    N * 1e-16.
    """
    if not 1 <= n <= N:
        raise DataError(f"best-of-n needs 1 <= n <= {N} (the number of answers per prompt), got n={n}")
    i = np.arange(N, 1, -1, dtype=np.float64)
    ratios = np.maximum(i - n, 0.0) / (i - 1)
    return (n / N * np.concatenate([[1.0], np.cumprod(ratios)]))[::-1].copy()


def _average_ties(selection: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values [P, N] with each run of equal selection scores (sorted along rows) replaced by its mean."""
    starts = np.ones(selection.shape, dtype=bool)
    starts[:, 1:] = selection[:, 1:] != selection[:, :-1]
    first = np.flatnonzero(starts)
    counts = np.diff(np.append(first, selection.size))
    means = np.add.reduceat(values.reshape(-1), first) / counts
    return np.repeat(means, counts).reshape(values.shape)


def bon_expected(selection, values, ns: Sequence[int]) -> np.ndarray:
    """Expected value of the answer that best-of-n picks, per prompt: [P, len(ns)], float64.

    Args:
        selection: [P, N] scores by which the best is picked (the proxy reward).
        values: [P, N] what is reported for the picked answer (the gold reward, or the proxy itself), for the *same
            answers in the same order*: the two arrays are aligned by position, and both are re-sorted by `selection`.
        ns: subset sizes, each 1 <= n <= N. n=1 is the plain mean, n=N the top answer.

    Ties in `selection` are broken at random, in expectation: tied answers share the average of their values. So
    the result does not depend on the order of the answers.
    """
    selection = np.asarray(selection, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    if selection.ndim != 2 or selection.shape != values.shape:
        raise DataError(
            f"best-of-n needs selection scores and values of one shape [prompts, answers], "
            f"got {selection.shape} and {values.shape}"
        )
    for name, array in (("selection score", selection), ("value", values)):
        bad = np.unique(np.nonzero(~np.isfinite(array))[0])
        if bad.size:
            raise DataError(f"best-of-n: non-finite {name} for prompts {bad[:10].tolist()}{' ...' * (bad.size > 10)}")
    weights = np.stack([bon_weights(selection.shape[1], int(n)) for n in ns], axis=1)
    expected = np.empty((len(selection), len(ns)))
    for start in range(0, len(selection), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        order = np.argsort(selection[rows], axis=1, kind="stable")
        ranked = np.take_along_axis(selection[rows], order, axis=1)
        expected[rows] = _average_ties(ranked, np.take_along_axis(values[rows], order, axis=1)) @ weights
    return expected
