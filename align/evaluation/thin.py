"""Curves for a screen: few points of a long run, with its outliers."""

import math

POINTS = 600  # of a curve at most: more than a screen can show

Point = tuple[float, float | None]


class ThinCurve:
    """A curve of at most POINTS points, whose memory does not grow with the number of values.

    Values are gathered in buckets of neighbours, and each keeps its lowest and its highest, so that one outlier among
    100,000 values stays; when the buckets are too many, neighbours are joined. The first and the last value stay too. A
    value that is not finite is None, and counts where its bucket has no other.
    """

    MOST = (POINTS - 2) // 4 * 2  # buckets: even, so that all can be joined in pairs

    def __init__(self) -> None:
        self.buckets: list[list[Point]] = []  # [lowest, highest]
        self.size = 1  # values in a full bucket
        self.filled = 0  # values in the last one
        self.first: Point | None = None
        self.last: Point | None = None
        self.not_finite_from: float | None = None  # x of the first such value

    def add(self, x: float, y: float | None) -> None:
        if y is None or not math.isfinite(y):
            y = None
            if self.not_finite_from is None:
                self.not_finite_from = x
        self.last = point = (x, y)
        if self.first is None:
            self.first = point
        if self.buckets and self.filled < self.size:
            _put(self.buckets[-1], point)
            self.filled += 1
            return
        if len(self.buckets) == self.MOST:
            for bucket, other in zip(self.buckets[::2], self.buckets[1::2], strict=True):
                _put(bucket, other[0])
                _put(bucket, other[1])
            self.buckets = self.buckets[::2]
            self.size *= 2
        self.buckets.append([point, point])
        self.filled = 1

    def points(self) -> tuple[list[float], list[float | None]]:
        """(x, y) in order."""
        points: list[Point] = []
        for bucket in self.buckets:
            points += sorted(dict.fromkeys(bucket), key=lambda point: point[0])
        if self.first is not None and self.last is not None:
            points = points if points[0] == self.first else [self.first, *points]
            points = points if points[-1] == self.last else [*points, self.last]
        return [x for x, _ in points], [y for _, y in points]


def _put(bucket: list[Point], point: Point) -> None:
    low, high, y = bucket[0][1], bucket[1][1], point[1]
    if y is None:
        return
    if low is None or high is None:
        bucket[:] = [point, point]
    elif y < low:
        bucket[0] = point
    elif y > high:
        bucket[1] = point


def thin(x: list, y: list) -> ThinCurve:
    curve = ThinCurve()
    for one, value in zip(x, y, strict=True):
        curve.add(one, value)
    return curve


def kept(values: list) -> list[int]:
    """The indices of the points of `thin`, in order."""
    return [int(index) for index in thin(list(range(len(values))), values).points()[0]]
