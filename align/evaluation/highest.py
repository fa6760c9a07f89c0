"""How far the highest evaluation of a curve lies above another one, with intervals that know that it was chosen.

The highest of many noisy means is too high by luck. So the lower end holds for all evaluations at once: no evaluation
is raised above its own by chance in more than 2.5 % of runs. The upper end needs no such care: whichever evaluation is
truly the highest, its own interval holds.
"""

import numpy as np

from align.evaluation.bootstrap import LEVEL, TILE, Seed, weight_tiles
from align.evaluation.rounding import first_highest, settled, slack

TAIL = (1 - LEVEL) / 2
NORMAL = 1.959963984540054  # the normal quantile at 1 - TAIL

Interval = tuple[float, float]


class Highest:
    """Of scores [K, P] (K >= 2 evaluations, P >= 2 prompts).

    index: the highest mean (the first of equals). possible [K]: whether an evaluation could be the highest of the true
    curve: it is below `index` by no more than chance, of all evaluations at once.
    """

    def __init__(self, scores, *, seed: Seed = 0):
        scores = np.asarray(scores, dtype=np.float64)
        _, self._exponent = np.frexp(np.abs(scores).max())  # scaled by it, exactly: squares of 1e200 do not exist
        self._scores = np.ldexp(scores, -self._exponent)
        self._slack, self.prompts = slack(self._scores), scores.shape[1]
        self.index = int(first_highest(self._scores.mean(1), self._slack))
        self._at = list(dict.fromkeys([self.index, 0, len(scores) - 1]))
        self._means, self._errors = zip(*(self._differences(at) for at in self._at), strict=True)
        self._critical = self._all_at_once(seed)
        below = self._means[0] + self._critical[0] * self._errors[0]
        self.possible = below >= 0

    def above(self, at: int) -> Interval:
        """The 95 % interval of the highest true mean minus that of evaluation `at` (0, or the last), never below 0."""
        number = self._at.index(at)
        means, errors = self._means[number], self._errors[number]
        low = (means - self._critical[number] * errors).max()
        high = (means + student(NORMAL, self.prompts - 1) * errors)[self.possible].max()
        return self._unscaled(max(low, 0.0)), self._unscaled(max(high, 0.0))

    def above_without_one(self, at: int) -> float:
        """The lower end of the own interval of the evaluation that decides `above`, without the prompt that raises it
        most. That it was chosen among others, `above` has allowed for already."""
        number = self._at.index(at)
        chosen = int((self._means[number] - self._critical[number] * self._errors[number]).argmax())
        raised = settled(self._scores[chosen] - self._scores[at], self._slack)
        rest = np.delete(raised, raised.argmax())
        error = _standard_error(rest[None], self._slack)[0] if len(rest) > 1 else 0.0
        return self._unscaled(rest.mean() - student(NORMAL, max(len(rest) - 1, 1)) * error)

    def share_lost(self) -> Interval:
        """The 95 % interval of (highest - end) / (highest - start), by Fieller's theorem for every possible highest.

        Never below 0; infinite where a possible highest does not rise above the start by more than chance.
        """
        (start, start_error), (end, end_error) = (
            (self._means[n], self._errors[n]) for n in (self._at.index(at) for at in (0, len(self._scores) - 1))
        )
        t2 = student(NORMAL, self.prompts - 1) ** 2
        covariance = (start_error**2 + end_error**2 - end_error[0] ** 2) / 2
        a, b, c = start**2 - t2 * start_error**2, start * end - t2 * covariance, end**2 - t2 * end_error**2
        with np.errstate(divide="ignore", invalid="ignore"):
            root = np.sqrt(np.maximum(b * b - a * c, 0))
            low = np.where(c <= 0, 0.0, np.where(a == 0, np.inf, (b - root) / a))
            high = np.where(a > 0, (b + root) / a, np.inf)
        return max(float(low[self.possible].min()), 0.0), float(high[self.possible].max())

    def _differences(self, at: int) -> tuple[np.ndarray, np.ndarray]:
        """The mean over prompts of every evaluation minus evaluation `at`, and its standard error: [K] both."""
        rows = max(1, TILE // self.prompts)
        parts = []
        for start in range(0, len(self._scores), rows):
            found = settled(self._scores[start : start + rows] - self._scores[at], self._slack)
            parts.append((settled(found.mean(1), self._slack), _standard_error(found, self._slack)))
        means, errors = zip(*parts, strict=True)
        return np.concatenate(means), np.concatenate(errors)

    def _all_at_once(self, seed: Seed) -> list[float]:
        """By how many standard errors chance raises the highest of all differences in 2.5 % of resamples."""
        of_all = self._scores.mean(1)
        shrink = np.sqrt((self.prompts - 1) / self.prompts)  # a resample's deviation is by 1 / P, an error's by P - 1
        highest: list[list[np.ndarray]] = [[] for _ in self._at]
        for weights in weight_tiles(self.prompts, 2 * len(of_all), seed=seed):
            moved = weights @ self._scores.T - of_all
            for at, errors, found in zip(self._at, self._errors, highest, strict=True):
                varies = errors > 0
                by = np.zeros(len(errors))
                by[varies] = 1 / (shrink * errors[varies])
                found.append(((moved - moved[:, at : at + 1]) * by).max(1))
        quantiles = [np.quantile(np.concatenate(found), 1 - TAIL, method="higher") for found in highest]
        return [student(max(float(quantile), NORMAL), self.prompts - 1) for quantile in quantiles]

    def _unscaled(self, value) -> float:
        return float(np.ldexp(value, self._exponent))


def student(normal: float, freedom: int) -> float:
    """The quantile of Student's t that belongs to a normal one (Abramowitz and Stegun 26.7.5), at 97.5 % too small by
    0.1 % for 5 degrees of freedom, 1 % for 3, 3 % for 2 and 24 % for 1."""
    x, n = normal, freedom
    first, second = (x**3 + x) / 4, (5 * x**5 + 16 * x**3 + 3 * x) / 96
    third = (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384
    return x + first / n + second / n**2 + third / n**3


def _standard_error(values: np.ndarray, slack: float) -> np.ndarray:
    """Of the mean of each row; 0 where its numbers are equal."""
    spread = settled(values.std(1, ddof=1), slack)
    return spread / np.sqrt(values.shape[1])
