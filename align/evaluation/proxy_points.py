"""Proxy points: up to which value of each proxy the gold score still rises (Moskovitz et al. 2023, arXiv 2310.04373,
section 3 and appendix A.3).

Runs that optimise one reward each, with all rewards measured beside it, are pooled: every evaluation is a point (mean
of each reward, mean gold score). A polynomial surface of gold over the rewards is fitted, and the proxy point is its
maximum where there are enough points near. The authors' heuristic, with what they left open made explicit: inputs are
scaled to [-1, 1], the ridge penalty is cross-validated, and the mask is a quantile of the points' own density.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.polynomial import legendre

from align.errors import ConfigError, DataError
from align.evaluation.bootstrap import TILE, percentile_interval, resample_weights
from align.evaluation.records import Run
from align.evaluation.rounding import slack

RIDGES = np.logspace(-6, 2, 25)
GRID = {1: 401, 2: 101, 3: 31}
MOST_RESAMPLES = 200
MOST_DENSITIES = 5000


@dataclass
class Points:
    """n evaluations of d rewards. per_prompt: [n, P, d + 1], gold last; run: its number [n]."""

    rewards: list[str]
    per_prompt: np.ndarray
    run: np.ndarray

    def scale(self) -> np.ndarray:
        """Divide each reward, and gold, by the power of two above its largest number; returns the exponents [d + 1].

        Squares of 1e200 do not exist; a power of two changes no digit, and the fit is the same in every unit.
        """
        _, exponents = np.frexp(np.abs(self.per_prompt).max((0, 1)))
        np.ldexp(self.per_prompt, -exponents, out=self.per_prompt)
        return exponents

    def means(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rewards [n, d] and gold [n]; weights: of the prompts, [P], for the bootstrap."""
        found = self.per_prompt.mean(1) if weights is None else np.tensordot(self.per_prompt, weights, (1, 0))
        return found[:, :-1], found[:, -1]


def collect(runs: Sequence[Run], rewards: Sequence[str] | None = None) -> Points:
    """The evaluations of runs that measured the same rewards (all of them, or those named) and a gold reward."""
    known = [{key.removeprefix("rewards/") for key in r.per_prompt if key.startswith("rewards/")} for r in runs]
    names = list(rewards) if rewards else sorted(set.intersection(*known))
    for run, found in zip(runs, known, strict=True):
        lacking = [name for name in names if name not in found]
        if lacking or not names:
            raise DataError(
                f"{run.path}: no evaluations of {', '.join(lacking) or 'any reward that all runs share'} (there are "
                f"{', '.join(sorted(found)) or 'none'}): name all rewards in every run, and weigh those that it does "
                "not optimise with 0 in reward_weights"
            )
        if run.gold is None:
            raise DataError(f"{run.path} has no gold scores, which the surface is fitted to: set gold_reward")
    if len(names) > max(GRID):
        raise ConfigError(f"a surface over {len(names)} rewards ({', '.join(names)}) needs more points than there are: "
                          f"name at most {max(GRID)} with --rewards")  # fmt: skip
    if len(set(names)) < len(names):
        raise ConfigError(f"--rewards {' '.join(names)}: a reward is named twice, and a surface has one axis for each")
    prompts = {run.per_prompt["gold"].shape[1] for run in runs}
    if len(prompts) > 1:
        raise DataError(f"the runs were evaluated on different numbers of prompts: {sorted(prompts)}")
    keys = [*(f"rewards/{name}" for name in names), "gold"]
    per_prompt = np.concatenate([np.stack([run.per_prompt[key] for key in keys], axis=-1) for run in runs])
    return Points(names, per_prompt, np.repeat(np.arange(len(runs)), [len(r) for r in runs]))


@dataclass
class Surface:
    """sum_k c_k P_k(z), products of Legendre polynomials of total degree up to `degree`, z the inputs in [-1, 1]."""

    low: np.ndarray
    high: np.ndarray
    degree: int
    ridge: float
    coefficients: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Predicted gold [n] at points [n, d]."""
        return features(scaled(points, self.low, self.high), self.degree) @ self.coefficients


def scaled(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return 2 * (points - low) / (high - low) - 1


def features(z: np.ndarray, degree: int) -> np.ndarray:
    """Products of Legendre polynomials of total degree up to `degree`, constant first: [n, d] -> [n, terms]."""
    dimensions = z.shape[1]
    powers = [legendre.legvander(z[:, i], degree) for i in range(dimensions)]
    terms = sorted((t for t in itertools.product(range(degree + 1), repeat=dimensions) if sum(t) <= degree), key=sum)
    return np.stack([np.prod([powers[i][:, k] for i, k in enumerate(term)], axis=0) for term in terms], axis=-1)


def solve(design: np.ndarray, gold: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression on the mean squared error; the constant is not penalised."""
    penalty = ridge * len(design) * np.eye(design.shape[1])
    penalty[0, 0] = 0
    return np.linalg.solve(design.T @ design + penalty + 1e-12 * np.eye(len(penalty)), design.T @ gold)


def fit_surface(points: np.ndarray, gold: np.ndarray, *, degree: int, ridge: float) -> Surface:
    low, high = points.min(0), points.max(0)
    return Surface(low, high, degree, ridge, solve(features(scaled(points, low, high), degree), gold, ridge))


def cross_validate(points: np.ndarray, gold: np.ndarray, folds: np.ndarray, degree: int) -> tuple[float, float]:
    """The largest ridge penalty of `RIDGES` whose error on folds left out is within one standard error of the smallest,
    and the share of gold's variance that it explains there. folds: the fold of each point [n].

    The smallest error itself would take hardly any penalty: neighbouring evaluations of one run resemble each other.
    """
    design = features(scaled(points, points.min(0), points.max(0)), degree)
    errors = []
    for ridge in RIDGES:
        predicted = np.empty_like(gold)
        for fold in np.unique(folds):
            out = folds == fold
            predicted[out] = design[out] @ solve(design[~out], gold[~out], ridge)
        errors.append((predicted - gold) ** 2)
    means = np.mean(errors, axis=1)
    best = int(np.argmin(means))
    bound = means[best] + np.std(errors[best], ddof=1) / np.sqrt(len(gold))
    chosen = int(np.flatnonzero(means <= bound)[-1])
    return float(RIDGES[chosen]), float(1 - means[chosen] / gold.var())


def density(at: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Gaussian kernel density of points [n, d] at [m, d], up to a constant; Scott's bandwidth per dimension."""
    bandwidth = points.std(0, ddof=1) * len(points) ** (-1 / (points.shape[1] + 4))
    rows = max(1, TILE // points.size)
    found = np.empty(len(at))
    for start in range(0, len(at), rows):
        gaps = (at[start : start + rows, None, :] - points[None]) / bandwidth
        found[start : start + rows] = np.exp(-0.5 * np.square(gaps).sum(-1)).mean(-1)
    return found


@dataclass
class ProxyPoint:
    """point, low, high: [d], with 95 % intervals. gold: predicted there. border: names of the rewards in whose
    direction the maximum lies on the edge of what the runs visited. axes: the grid per reward; surface, allowed: on
    the grid. explained: share of gold's variance explained out of fold."""

    rewards: list[str]
    point: np.ndarray
    low: np.ndarray
    high: np.ndarray
    gold: float
    border: list[str]
    degree: int
    ridge: float
    explained: float
    axes: list[np.ndarray]
    surface: np.ndarray
    allowed: np.ndarray
    visited: np.ndarray
    visited_gold: np.ndarray

    def as_dict(self) -> dict:
        best = int(np.argmax(self.visited_gold))
        return {
            "point": dict(zip(self.rewards, self.point.tolist(), strict=True)),
            "interval": {
                name: [float(a), float(b)] for name, a, b in zip(self.rewards, self.low, self.high, strict=True)
            },
            "gold": self.gold,
            "border": self.border,
            "degree": self.degree,
            "ridge": self.ridge,
            "explained_variance_out_of_fold": self.explained,
            "evaluations": len(self.visited),
            "best_visited": {
                "point": dict(zip(self.rewards, self.visited[best].tolist(), strict=True)),
                "gold": float(self.visited_gold[best]),
            },
        }


def find_proxy_point(
    runs: Sequence[Run],
    rewards: Sequence[str] | None = None,
    *,
    degree: int = 4,
    mask_quantile: float = 0.05,
    resamples: int = MOST_RESAMPLES,
    seed: int = 0,
) -> ProxyPoint:
    """The proxy point of runs that optimised one reward each.

    degree: total degree of the surface (10 in the paper). mask_quantile: points of the grid that are less dense than
    this share of the evaluations are left out. The intervals are of a bootstrap over the evaluation prompts: they hold
    the noise of the evaluations, not the spread between training runs.
    """
    if degree < 1:
        raise ConfigError(f"degree must be at least 1, got {degree}: a constant has no maximum")
    if not 0 <= mask_quantile < 1:
        raise ConfigError(f"mask_quantile is a share of the evaluations in [0, 1), got {mask_quantile}")
    points = collect(runs, rewards)
    exponents = points.scale()
    values, gold = points.means()
    _check(points.rewards, values, gold)
    folds = np.random.default_rng(seed).permutation(len(values)) % min(10, len(values))
    ridge, explained = cross_validate(values, gold, folds, degree)
    axes = [np.linspace(a, b, GRID[values.shape[1]]) for a, b in zip(values.min(0), values.max(0), strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    flat = grid.reshape(-1, len(axes))
    some = values[:: max(1, len(values) // MOST_DENSITIES)]  # enough for a quantile
    allowed = density(flat, values) >= np.quantile(density(some, values), mask_quantile)
    surface = fit_surface(values, gold, degree=degree, ridge=ridge)
    design = features(scaled(flat, surface.low, surface.high), degree)
    predicted = design @ surface.coefficients
    top = int(np.argmax(np.where(allowed, predicted, -np.inf)))
    peaks = []
    for weights in resample_weights(points.per_prompt.shape[1], resamples=resamples, seed=seed):
        again, gold_again = points.means(weights)
        again = solve(features(scaled(again, surface.low, surface.high), degree), gold_again, ridge)
        peaks.append(flat[np.argmax(np.where(allowed, design @ again, -np.inf))])
    low, high = percentile_interval(np.array(peaks))
    found = ProxyPoint(
        rewards=points.rewards,
        point=flat[top],
        low=low,
        high=high,
        gold=float(predicted[top]),
        border=border(allowed.reshape(grid.shape[:-1]), np.unravel_index(top, grid.shape[:-1]), points.rewards),
        degree=degree,
        ridge=ridge,
        explained=explained,
        axes=axes,
        surface=predicted.reshape(grid.shape[:-1]),
        allowed=allowed.reshape(grid.shape[:-1]),
        visited=values,
        visited_gold=gold,
    )
    return _in_units(found, exponents)


def _check(rewards: list[str], values: np.ndarray, gold: np.ndarray) -> None:
    """DataError for evaluations, rewards [n, d] and gold [n], that no surface can be fitted to."""
    if len(values) < 2 * values.shape[1] + 4:
        raise DataError(f"{len(values)} evaluations are too few for a surface over {', '.join(rewards)}")
    columns = zip([*rewards, "gold"], [*values.T, gold], strict=True)
    still = [name for name, means in columns if np.ptp(means) <= slack(means)]
    if still:
        raise DataError(f"{', '.join(still)} never changed in these runs: there is no point to be found")


def _in_units(found: ProxyPoint, exponents: np.ndarray) -> ProxyPoint:
    """What was found with scaled numbers (`Points.scale`), in the units of the runs."""
    units, of_gold = exponents[:-1], exponents[-1]
    per_reward = {name: np.ldexp(getattr(found, name), units) for name in ("point", "low", "high", "visited")}
    return replace(
        found,
        **per_reward,
        axes=[np.ldexp(axis, unit) for axis, unit in zip(found.axes, units, strict=True)],
        gold=float(np.ldexp(found.gold, of_gold)),
        surface=np.ldexp(found.surface, of_gold),
        visited_gold=np.ldexp(found.visited_gold, of_gold),
    )


def border(allowed: np.ndarray, index: tuple, rewards: list[str]) -> list[str]:
    """The rewards along which a neighbour of this cell of the grid is masked or missing."""
    found = []
    for axis, name in enumerate(rewards):
        for step in (-1, 1):
            near = list(index)
            near[axis] += step
            if not 0 <= near[axis] < allowed.shape[axis] or not allowed[tuple(near)]:
                found.append(name)
                break
    return found
