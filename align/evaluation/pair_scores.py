"""Scores of both answers of preference pairs, with the pairs that a reward cannot score found by number."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from align.errors import RewardError
from align.evaluation.pairs import Pairs
from align.reward_models.base import Reward, RewardBatch, RewardOutput

logger = logging.getLogger(__name__)

PAIRS_AT_ONCE = 256
ON_END = 16  # refusals at the start of a batch after which no other pair of it is tried
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
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        indices = range(start, min(start + PAIRS_AT_ONCE, len(pairs)))
        for part, output in _outputs(reward, pairs, indices, result):
            scores[:, part] = _two_rows(output.scores)
            for name, values in output.extras.items():
                if MEMBER.fullmatch(name):
                    members.setdefault(name, np.full((2, len(pairs)), np.nan))[:, part] = _two_rows(values)
        if progress is not None:
            progress.update(2 * len(indices))
    return result


def _outputs(
    reward: Reward, pairs: Pairs, indices: range, result: PairScores
) -> Iterator[tuple[list[int], RewardOutput]]:
    try:
        yield list(indices), reward.score(_batch(pairs, indices))
        return
    except RewardError as error:
        whole = error
    refused = 0
    for index in indices:
        try:
            output = reward.score(_batch(pairs, [index]))
        except RewardError as error:
            refused += 1
            result.failed.append(index)
            result.reason = result.reason or OF_THE_BATCH.sub("", str(error))
            if refused == min(ON_END, len(pairs)) == index - indices[0] + 1:
                raise whole from error
        else:
            yield [index], output
    if refused == 0:
        raise whole  # refuses the batch and none of its pairs: not a matter of rows


def _batch(pairs: Pairs, indices):

    part = pairs.select(indices)
    return RewardBatch(
        prompts=part.prompts * 2,
        completions=part.chosen + part.rejected,
        columns={name: values * 2 for name, values in part.columns.items()},
    )


def _two_rows(values) -> np.ndarray:
    return values.double().cpu().numpy().reshape(2, -1)
