"""The functional forms of Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization" (arXiv 2210.10760), eq.
1-2.

With d = sqrt(KL) (KL in nats), and the gold score R recentred so that R(0) = 0 in units of one standard deviation:

    best-of-n            R(d) = d (alpha - beta d)
    reinforcement        R(d) = d (alpha - beta ln d)

Both are linear in (alpha, beta), so they are fitted by least squares without an intercept, uniform weights, on d > 0
only (the second has an infinite slope at 0). KL of best-of-n and KL of a trained policy must not be compared with
each other.
"""

from dataclasses import dataclass

import numpy as np

from align.evaluation.bootstrap import RESAMPLES, percentile_interval, weight_tiles
from align.evaluation.strict_json import finite

FORMS = ("bon", "rl")
MIN_POINTS = 3  # two coefficients and something left to judge them by
WIDTH = 4  # numbers held for a point of a resampled curve: d, score and the design


def gao_bon(d, alpha: float, beta: float):
    """R(d) = d (alpha - beta d)."""
    d = np.asarray(d, dtype=np.float64)
    return d * (alpha - beta * d)


def gao_rl(d, alpha: float, beta: float):
    """R(d) = d (alpha - beta ln d), with its limit 0 at d = 0."""
    d = np.asarray(d, dtype=np.float64)
    return d * (alpha - beta * np.log(np.where(d > 0, d, 1.0)))


def gao_bon_peak(alpha: float, beta: float) -> tuple[float, float]:
    """(d*, R*) = (alpha / 2 beta, alpha^2 / 4 beta); needs beta > 0."""
    return alpha / (2 * beta), alpha**2 / (4 * beta)


def gao_rl_peak(alpha: float, beta: float) -> tuple[float, float]:
    """(d*, R*) = (exp(alpha / beta - 1), beta d*); needs beta > 0. Infinite where the exponential overflows."""
    with np.errstate(over="ignore"):
        d = float(np.exp(np.float64(alpha / beta - 1)))
    return d, beta * d


FUNCTIONS = {"bon": gao_bon, "rl": gao_rl}
PEAKS = {"bon": gao_bon_peak, "rl": gao_rl_peak}


@dataclass
class GaoFit:
    """A fitted form. Scores in the unit that was fitted; d in sqrt(nats).

    r2: 1 - residual / total sum of squares about the mean, over the fitted points. rmse: their root mean square
    residual. peak_status: "measured" (inside the fitted range of d), "not reached in the data" (beyond it: an
    extrapolation), "before the data" (below the smallest d), "none" (beta <= 0: the fit never turns down, or it
    falls from the start). peak_d, peak_score: None without a peak. intervals: name -> (low, high) of alpha, beta and
    peak_d; None = unbounded.
    """

    form: str
    alpha: float
    beta: float
    r2: float | None
    rmse: float
    points: int
    d_min: float
    d_max: float
    peak_status: str
    peak_d: float | None
    peak_score: float | None
    intervals: dict[str, tuple[float | None, float | None]] | None = None

    def __call__(self, d):
        return FUNCTIONS[self.form](d, self.alpha, self.beta)


def _solve(form: str, d: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares over the last axis of d, score [..., K] by the normal equations: (alpha, beta) [...]; d = 0
    ignored."""
    used = d > 0
    first = np.where(used, d, 0.0)
    second = -(first**2) if form == "bon" else -first * np.log(np.where(used, d, 1.0))
    design = np.stack([first, second], axis=-1)
    gram = np.einsum("...ki,...kj->...ij", design, design)
    moments = np.einsum("...ki,...k->...i", design, score)
    solution = np.linalg.solve(gram, moments[..., None])[..., 0]
    return solution[..., 0], solution[..., 1]


def _distinct(d: np.ndarray) -> np.ndarray:
    """[...]: whether d [..., K] has `MIN_POINTS` values above 0 that differ by more than the precision of a fit."""
    high = d.max(-1, keepdims=True)
    low = np.where(d > 0, d, np.inf).min(-1, keepdims=True)
    step = 1e-5 * high
    return ((d > low + step) & (d < high - step)).any(-1)


def _peak_d(form: str, alpha: float, beta: float) -> float:
    """d of the fit's maximum: infinity when it never turns down, 0 when it falls from the start."""
    if beta <= 0:
        return np.inf if alpha > 0 else 0.0
    if form == "bon" and alpha <= 0:
        return 0.0
    return PEAKS[form](alpha, beta)[0]


def fit_gao(form: str, d, score) -> GaoFit | None:
    """Fit one form to score [K] at d [K]; points with d <= 0 are left out. None with fewer than 3 distinct points."""
    d, score = np.asarray(d, dtype=np.float64), np.asarray(score, dtype=np.float64)
    used = d > 0
    d, score = d[used], score[used]
    if len(d) < MIN_POINTS or not _distinct(d):
        return None
    alpha, beta = (float(x) for x in _solve(form, d, score))
    residual = score - FUNCTIONS[form](d, alpha, beta)
    total = float(np.sum((score - score.mean()) ** 2))
    peak = _peak_d(form, alpha, beta)
    if not 0 < peak < np.inf:
        status, peak_d, peak_score = "none", None, None
    else:
        status = "measured"
        if peak > d.max():
            status = "not reached in the data"
        elif peak < d.min():
            status = "before the data"
        peak_d, peak_score = peak, float(FUNCTIONS[form](peak, alpha, beta))
    return GaoFit(
        form=form,
        alpha=alpha,
        beta=beta,
        r2=1 - float(np.sum(residual**2)) / total if total > 0 else None,
        rmse=float(np.sqrt(np.mean(residual**2))),
        points=len(d),
        d_min=float(d.min()),
        d_max=float(d.max()),
        peak_status=status,
        peak_d=peak_d,
        peak_score=peak_score,
    )


def fit_gao_bootstrap(form: str, kl, gold, unit: float, *, seed: int = 0) -> GaoFit | None:
    """Fit one form to the means over prompts of gold [K, P] at kl [K] or [K, P], with intervals over prompts.

    The score is (gold - gold of the first point) / unit, recentred in every resample. The first point is the initial
    policy. Where kl is per prompt it is resampled along with the gold scores.
    """
    kl, gold = np.asarray(kl, dtype=np.float64), np.asarray(gold, dtype=np.float64)

    def curve(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        means, mean_kl = weights @ gold.T, kl if kl.ndim == 1 else weights @ kl.T
        d = np.broadcast_to(np.sqrt(np.maximum(mean_kl, 0)), means.shape)
        return d, (means - means[..., :1]) / unit

    num_prompts = gold.shape[1]
    fit = fit_gao(form, *curve(np.full(num_prompts, 1 / num_prompts)))
    if fit is None or num_prompts < 2:
        return fit
    found = []
    for weights in weight_tiles(num_prompts, WIDTH * len(gold), seed=seed):
        d, score = curve(weights)
        enough = _distinct(d)
        found.append(np.stack(_solve(form, d[enough], score[enough]), axis=1))
    coefficients = np.concatenate(found)
    if len(coefficients) < RESAMPLES / 2:
        return fit
    peaks = [_peak_d(form, alpha, beta) for alpha, beta in coefficients]
    low, high = percentile_interval(np.column_stack([coefficients, peaks]))
    fit.intervals = {name: (finite(low[i]), finite(high[i])) for i, name in enumerate(("alpha", "beta", "peak_d"))}
    return fit


def extrapolation_check(form: str, d, score, cut: float) -> dict | None:
    """Fit where d <= cut and predict where d > cut, as in figure 26 of the paper.

    Returns the fit's alpha and beta, the number of points on both sides, the root mean square error on the right,
    and the predicted and the measured score at the largest d. None when a side has too few points.
    """
    d, score = np.asarray(d, dtype=np.float64), np.asarray(score, dtype=np.float64)
    left, right = (d > 0) & (d <= cut), d > cut
    fit = fit_gao(form, d[left], score[left])
    if fit is None or not right.any():
        return None
    error = fit(d[right]) - score[right]
    last = int(np.argmax(d))
    return {
        "cut_d": float(cut),
        "points_left": fit.points,
        "points_right": int(right.sum()),
        "alpha": fit.alpha,
        "beta": fit.beta,
        "rmse_right": float(np.sqrt(np.mean(error**2))),
        "end_predicted": float(fit(d[last])),
        "end_measured": float(score[last]),
    }
