"""Which points of a front matter, and how much of the space of rewards they reach. Every objective is maximised."""

import numpy as np

from align.errors import ConfigError


def dominates(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether `a` is at least as good as `b` in every objective and better in one. a, b: [..., K]; result [...]."""
    return np.asarray((a >= b).all(-1) & (a > b).any(-1))


def non_dominated(points: np.ndarray) -> np.ndarray:
    """bool [P]: the points [P, K] that no other point dominates."""
    return np.asarray(~dominates(points[:, None], points[None]).any(0))


def dominated_share(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[P]: in which share of the resamples one of `others` [R, Q, K] dominates the point, points [R, P, K]."""
    return dominates(others[:, :, None], points[:, None]).any(1).mean(0)


def above_front(points: np.ndarray, front: np.ndarray) -> np.ndarray:
    """[P]: how far points [P, 2] lie above a front [Q, 2], negative below it.

    The front is the upper convex hull of its points (what mixtures of its policies reach), going on straight down and
    to the left beyond its ends. The distance is what a point has to lose in both objectives to lie on it, so bring the
    objectives to comparable units first.
    """
    if points.shape[-1] != 2 or front.shape[-1] != 2:
        raise ConfigError(f"above_front is for two objectives, got {points.shape[-1]}")
    best = front[non_dominated(front)]
    best = best[np.argsort(best[:, 0])]
    gaps = [points[:, 0] - best[-1, 0], points[:, 1] - best[0, 1]]
    hull = upper_hull(best)
    for (x0, y0), (x1, y1) in zip(hull, hull[1:], strict=False):
        slope = (y1 - y0) / (x1 - x0)  # negative
        gaps.append((points[:, 1] - y0 - slope * (points[:, 0] - x0)) / (1 - slope))
    return np.max(gaps, axis=0)


def upper_hull(points: np.ndarray) -> np.ndarray:
    """The corners of the upper convex hull of points [Q, 2] that are sorted by the first objective."""
    hull: list[np.ndarray] = []
    for point in points:
        while len(hull) > 1 and _turns_left(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return np.array(hull)


def _turns_left(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> bool:
    (x, y), (u, v) = b - a, c - a
    return bool(x * v - y * u >= 0)
