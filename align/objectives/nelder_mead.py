"""Nelder-Mead search as an ask/tell object, for thresholds whose evaluation is a stretch of training (NM-PPO).

Moskovitz et al. 2023 (arXiv 2310.04373), section A.4, algorithm 3, with two errors corrected: the sign, and dimensions
by name, so that thresholds cannot be swapped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from align.errors import ConfigError

Point = dict[str, float]


class _Needed(Exception):
    """The search cannot go on before this point has been evaluated."""

    def __init__(self, point: np.ndarray):
        self.point = point


@dataclass
class NelderMead:
    """Maximises a score over named dimensions. `ask` gives the next point, `tell` its score.

    The history of evaluations is the whole state: what to ask next follows from it, so a resumed search asks what the
    interrupted one would have asked.

    Args:
        simplex: N + 1 points of N dimensions to start from (`random_simplex`).
        budget: the largest number of evaluations.
        tolerance: the search ends when the scores of the simplex deviate less than this, after a shrink (the paper's
            rule).
        cache_tolerance: a point that is no farther than this from an earlier one in every dimension takes its score
            (absolute; a number, or one per dimension); None evaluates every point.
        reflect, expand, contract, shrink: the coefficients alpha, gamma, rho and sigma.
    """

    simplex: Sequence[Point]
    budget: int
    tolerance: float = 0.01
    cache_tolerance: float | Point | None = 5e-3
    reflect: float = 1.0
    expand: float = 2.0
    contract: float = 0.5
    shrink: float = 0.5
    history: list[tuple[Point, float]] = field(default_factory=list)

    def __post_init__(self):
        self.names = list(self.simplex[0])
        if any(set(point) != set(self.names) for point in self.simplex):
            raise ConfigError(f"every point of the simplex must have the dimensions {', '.join(self.names)}")
        if len(self.simplex) != len(self.names) + 1:
            raise ConfigError(
                f"{len(self.names)} dimensions need a simplex of {len(self.names) + 1} points, got {len(self.simplex)}"
            )
        if self.budget < len(self.simplex):
            raise ConfigError(f"the budget of {self.budget} evaluations is less than the simplex's {len(self.simplex)}")
        self.simplexes: list[list[Point]] = []

    def ask(self) -> Point | None:
        """The next point to evaluate; None when the search has converged or its budget is spent."""
        if len(self.history) >= self.budget:
            return None
        try:
            self._search()
        except _Needed as needed:
            return self._named(needed.point)
        return None

    def tell(self, point: Point, score: float) -> None:
        """The score of a point that was asked for."""
        if set(point) != set(self.names):
            raise ConfigError(f"expected the dimensions {', '.join(self.names)}, got {', '.join(point)}")
        if not np.isfinite(score):
            raise ConfigError(f"the score of {point} is {score}: a search cannot rank it")
        self.history.append(({name: float(point[name]) for name in self.names}, float(score)))

    @property
    def best(self) -> tuple[Point, float]:
        """The evaluated point with the highest score, and that score."""
        return max(self.history, key=lambda entry: entry[1])

    def state_dict(self) -> dict:
        return {"simplex": list(self.simplex), "history": list(self.history)}

    def load_state_dict(self, state: dict) -> None:
        self.simplex, self.history = state["simplex"], [tuple(entry) for entry in state["history"]]

    def _named(self, point: np.ndarray) -> Point:
        return dict(zip(self.names, point.tolist(), strict=True))

    def _loss(self, point: np.ndarray) -> float:
        evaluated = np.array([[p[name] for name in self.names] for p, _ in self.history]).reshape(-1, len(self.names))
        exact = np.flatnonzero((evaluated == point).all(-1))
        if len(exact):
            return -self.history[exact[0]][1]
        if self.cache_tolerance is not None:
            tolerance = self.cache_tolerance
            room = np.array([tolerance[name] for name in self.names] if isinstance(tolerance, dict) else tolerance)
            near = np.flatnonzero((np.abs(evaluated - point) <= room).all(-1))
            if len(near):
                return -self.history[near[0]][1]
        raise _Needed(point)

    def _search(self) -> None:
        """The whole search over the known scores; raises `_Needed` at the first unknown one."""
        self.simplexes = []
        points = [np.array([point[name] for name in self.names]) for point in self.simplex]
        vertices = [(self._loss(point), point) for point in points]
        while True:
            vertices.sort(key=lambda vertex: vertex[0])
            self.simplexes.append([self._named(point) for _, point in vertices])
            worst_loss, worst = vertices[-1]
            centroid = np.mean([point for _, point in vertices[:-1]], axis=0)
            reflected = centroid + self.reflect * (centroid - worst)
            loss = self._loss(reflected)
            if vertices[0][0] <= loss < vertices[-2][0]:
                vertices[-1] = (loss, reflected)
                continue
            if loss < vertices[0][0]:
                expanded = centroid + self.expand * (reflected - centroid)
                expanded_loss = self._loss(expanded)
                # Kept if it beats the best vertex, as in the released code; textbooks ask it to beat the reflection.
                kept = expanded_loss < vertices[0][0]
                vertices[-1] = (expanded_loss, expanded) if kept else (loss, reflected)
                continue
            contracted = centroid + self.contract * (worst - centroid)
            contracted_loss = self._loss(contracted)
            if contracted_loss < worst_loss:
                vertices[-1] = (contracted_loss, contracted)
                continue
            best = vertices[0][1]
            shrunk = [best + self.shrink * (point - best) for _, point in vertices[1:]]
            vertices = [vertices[0], *((self._loss(point), point) for point in shrunk)]
            if np.std([loss for loss, _ in vertices]) < self.tolerance:
                self.simplexes.append([self._named(point) for _, point in vertices])
                return


def random_simplex(start: Point, reached: Point, rng: np.random.Generator) -> list[Point]:
    """N + 1 points, each coordinate uniform between where the policy starts and the largest value that it ever reached.

    Thresholds drawn over a reward's whole range fail: most combinations cannot be met together (section A.4).
    """
    stuck = [name for name in start if start[name] == reached[name]]
    if stuck or set(start) != set(reached):
        raise ConfigError(f"a simplex needs two different values per dimension, look at {', '.join(stuck or start)}")
    return [
        {name: start[name] + rng.uniform() * (reached[name] - start[name]) for name in start}
        for _ in range(len(start) + 1)
    ]
