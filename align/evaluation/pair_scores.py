"""Scores of both answers of preference pairs, with the pairs that a reward cannot score found by number."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from align.errors import RewardError
from align.evaluation.pairs import Pairs
from align.reward_models.base import Reward, RewardBatch, RewardOutput

logger = logging.getLogger(__name__)

PAIRS_AT_ONCE = 256
ON_END = 16  # rows refused at the start of a batch after which no other pair of it is tried
MEMBER = re.compile(r"member/\d+")  # not member/0/failed, which a member says beside its score
OF_THE_BATCH = re.compile(r",?( for)? ?(row \d+|rows \[[^]]*\]( \.\.\.)?) of the batch")


@dataclass
class PairScores:
    """chosen, rejected: float64 [N], NaN where the pair could not be scored. members: by name, float64 [2, N] (chosen,
    rejected), for an ensemble. failed: indices of the pairs without scores. reason: the first one's, or ""."""

    chosen: np.ndarray
    rejected: np.ndarray
    members: dict[str, np.ndarray] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)
    reason: str = ""

    @property
    def margins(self) -> np.ndarray:
        return self.chosen - self.rejected

    @property
    def both(self) -> np.ndarray:
        """[2N], chosen first."""
        return np.concatenate([self.chosen, self.rejected])

    def select(self, indices) -> "PairScores":
        members = {name: values[:, indices] for name, values in self.members.items()}
        return PairScores(self.chosen[indices], self.rejected[indices], members)


def score_pairs(reward: Reward, pairs: Pairs, progress=None) -> PairScores:
    """Score all pairs.

    A batch that the reward refuses is scored again pair by pair, so that one answer that is too long does not end the
    evaluation. Where it refuses the first 16 of them too, the fault is in the reward (a server that is down), and its
    error is raised. progress: has `update(answers)`.
    """
    scores = np.full((2, len(pairs)), np.nan)
    members: dict[str, np.ndarray] = {}
    result = PairScores(scores[0], scores[1], members)
    for indices in _batches(pairs.rows):
        for part, answers, output in _outputs(reward, pairs, indices, result):
            scores[:, part] = _two_rows(output.scores, answers)
            for name, values in output.extras.items():
                if MEMBER.fullmatch(name):
                    members.setdefault(name, np.full((2, len(pairs)), np.nan))[:, part] = _two_rows(values, answers)
        if progress is not None:
            progress.update(2 * len(indices))
    return result


def _batches(rows: Sequence[int]) -> Iterator[range]:
    """`PAIRS_AT_ONCE` pairs, or more where a row would be cut, whose pairs share answers."""
    start = 0
    while start < len(rows):
        end = min(start + PAIRS_AT_ONCE, len(rows))
        while end < len(rows) and rows[end] == rows[end - 1]:
            end += 1
        yield range(start, end)
        start = end


def _outputs(
    reward: Reward, pairs: Pairs, indices: range, result: PairScores
) -> Iterator[tuple[list[int], list[int], RewardOutput]]:
    try:
        batch, answers = _batch(pairs, indices)
        yield list(indices), answers, reward.score(batch)
        return
    except RewardError as error:
        whole = error
    refused: list[int] = []
    on_end = min(ON_END, len(set(pairs.rows)))
    for number, index in enumerate(indices, start=1):
        try:
            batch, answers = _batch(pairs, [index])
            output = reward.score(batch)
        except RewardError as error:
            refused.append(pairs.rows[index])
            result.failed.append(index)
            result.reason = result.reason or OF_THE_BATCH.sub("", str(error))
            if len(refused) == number and len(set(refused)) == on_end:
                raise whole from error
        else:
            yield [index], answers, output
    if not refused:
        raise whole  # refuses the batch and none of its pairs: not a matter of rows


def _batch(pairs: Pairs, indices) -> tuple[RewardBatch, list[int]]:
    """The answers of these pairs, each once, and where those of the pairs are among them, chosen first."""
    part = pairs.select(indices)
    names = part.answers()
    first = {name: index for index, name in reversed(list(enumerate(names)))}
    kept = sorted(first.values())
    where = {name: number for number, name in enumerate(names[index] for index in kept)}

    def once(values: list) -> list:
        return [values[index] for index in kept]

    batch = RewardBatch(
        prompts=once(part.prompts * 2),
        completions=once(part.chosen + part.rejected),
        columns={name: once(values * 2) for name, values in part.columns.items()},
    )
    return batch, [where[name] for name in names]


def _two_rows(values, answers: list[int]) -> np.ndarray:
    return values.double().cpu().numpy()[answers].reshape(2, -1)
