"""The best-of-n curve: what the proxy picks, and what the gold reward thinks of it, against KL."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from align.errors import DataError
from align.evaluation.rounding import deviation
from align.objectives.best_of_n import bon_expected, bon_kl


@dataclass
class BonCurve:
    """Best-of-n by one proxy. K values of n, P prompts.

    n: int [K]. kl: float [K], ln n - (n-1)/n nats, an upper bound where answers repeat or tie.
    proxy, gold: float [K], means over prompts of the unbiased estimate. per_prompt: "proxy" and "gold", float [K, P].
    proxy_sd, gold_sd: standard deviation of the score over all answers of the initial policy: the curve's unit in fits.
    answers: the smallest and the largest number of answers per prompt. notes: what the reader must know.
    """

    name: str
    proxy_name: str
    gold_name: str
    n: np.ndarray
    kl: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray
    per_prompt: dict[str, np.ndarray]
    proxy_sd: float
    gold_sd: float
    answers: tuple[int, int]
    notes: list[str] = field(default_factory=list)


def n_grid(num_answers: int) -> list[int]:
    """1, 2, 4, ... up to the number of answers, which ends the grid where the last power of two is far below it."""
    grid = [2**k for k in range(num_answers.bit_length())]
    return grid if num_answers < 1.25 * grid[-1] else [*grid, num_answers]


def bon_curve(
    selection: Sequence[np.ndarray],
    gold: Sequence[np.ndarray],
    *,
    ns: Sequence[int] | None = None,
    min_answers: int | None = None,
    name: str = "proxy",
    proxy_name: str | None = None,
    gold_name: str = "gold",
) -> BonCurve:
    """The curve of best-of-n by `selection`, scored by `gold`.

    Args:
        selection, gold: one float array per prompt (or a [P, N] array), the same answers in the same order in both.
        ns: values of n; default `n_grid` of the smallest number of answers that a prompt has. 1 is always among them.
        min_answers: leave out the prompts with fewer answers, so that a few short ones do not limit n.
    Raises DataError when an n exceeds the answers of a prompt, nothing is left, or gold is one score.
    """
    if len(selection) != len(gold) or any(len(s) != len(g) for s, g in zip(selection, gold, strict=False)):
        raise DataError(f"{name}: selection and gold scores must have the same prompts and the same answers")
    keep, grid, notes = _choose(np.array([len(scores) for scores in selection]), ns, min_answers, name)
    selection = [np.asarray(selection[p], dtype=np.float64) for p in keep]
    gold = [np.asarray(gold[p], dtype=np.float64) for p in keep]
    if (gold_sd := deviation(np.concatenate(gold))) == 0:
        raise DataError(
            f"{name}: the gold score {gold_name} is {gold[0][0]:g} for every answer: it cannot judge a choice"
        )
    counts = np.array([len(scores) for scores in selection])
    per_prompt = {"proxy": np.empty((len(grid), keep.size)), "gold": np.empty((len(grid), keep.size))}
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        scores = np.stack([selection[p] for p in rows])
        per_prompt["proxy"][:, rows] = bon_expected(scores, scores, grid).T
        per_prompt["gold"][:, rows] = bon_expected(scores, np.stack([gold[p] for p in rows]), grid).T
    times = np.concatenate([np.unique(scores, return_counts=True)[1] for scores in selection])  # of each score
    tied = times[times > 1].sum()
    if tied:
        share = tied / counts.sum()
        percent = f"{100 * share:.0f}" if share > 0.01 else "under 1"
        notes.append(f"{percent} % of the answers tie with another of their prompt: the true KL is below the formula's")
    return BonCurve(
        name=name,
        proxy_name=proxy_name or name,
        gold_name=gold_name,
        n=np.array(grid),
        kl=bon_kl(np.array(grid)),
        proxy=per_prompt["proxy"].mean(1),
        gold=per_prompt["gold"].mean(1),
        per_prompt=per_prompt,
        proxy_sd=deviation(np.concatenate(selection)),
        gold_sd=gold_sd,
        answers=(int(counts.min()), int(counts.max())),
        notes=notes,
    )


def joined_notes(curves: dict[str, BonCurve]) -> list[str]:
    """The notes of several curves, each once, with the names of those that it is about unless it is about all."""
    names: dict[str, list[str]] = {}
    for name, curve in curves.items():
        for note in curve.notes:
            names.setdefault(note, []).append(name)
    return [note if len(of) == len(curves) else f"{', '.join(of)}: {note}" for note, of in names.items()]


def _choose(
    counts: np.ndarray, ns: Sequence[int] | None, min_answers: int | None, name: str
) -> tuple[np.ndarray, list[int], list[str]]:
    """Which prompts, by their numbers of answers [P], and which values of n; notes for the reader."""
    notes = []
    if min_answers is not None and min_answers < 1:
        raise DataError(f"{name}: min_answers must be at least 1, got {min_answers}")
    keep = np.flatnonzero(counts >= (min_answers or 1))
    if keep.size == 0:
        raise DataError(
            f"{name}: no prompt has at least {min_answers or 1} answers (the most is {counts.max(initial=0)})"
        )
    if keep.size < counts.size:
        notes.append(f"{counts.size - keep.size} of {counts.size} prompts left out: fewer than {min_answers} answers")
    counts = counts[keep]
    smallest, largest = int(counts.min()), int(counts.max())
    grid = n_grid(smallest) if ns is None else sorted({1, *(int(n) for n in ns)})
    if grid == [1]:
        raise DataError(
            f"{name}: a prompt has a single answer, so there is nothing to select; set min_answers to 2 or more"
        )
    if grid[-1] > smallest:
        raise DataError(
            f"{name}: n={grid[-1]} needs as many answers for every prompt, and {int((counts < grid[-1]).sum())} of "
            f"{counts.size} prompts have fewer (the fewest is {smallest}); give smaller n, or min_answers={grid[-1]} "
            "to leave those prompts out"
        )
    if smallest < largest and ns is None:
        notes.append(
            f"prompts have {smallest} to {largest} answers: n stops at {smallest}, the smallest number "
            "(min_answers leaves short prompts out instead)"
        )
    return keep, grid, notes
