"""Preference pairs, their rewrites, and the scores of each reward, kept until all rewards have scored them."""

import time
from dataclasses import dataclass, field

from tqdm import tqdm

from align.data.bad_rows import BadRows
from align.evaluation.pair_scores import PairScores, score_pairs
from align.evaluation.pairs import Pairs
from align.evaluation.rewrite_sample import Rewritten
from align.reward_models.base import Reward
from align.reward_models.classifier import ClassifierReward
from align.reward_models.vllm_server import VllmReward


@dataclass
class Scored:
    """What one reward says. pairs, rewrites: scores of all pairs, and of the rewritten ones by rewrite.

    unit: what a margin is multiplied by so that sigmoid(margin) is the probability that the model was trained for;
    meaning: the unit in words. answers_per_second: of the pairs as they are.
    """

    pairs: PairScores
    rewrites: dict[str, PairScores]
    unit: float
    meaning: str
    answers_per_second: float


@dataclass
class PairSample:
    """All pairs, the report on the rows that are none, and the rewritten ones. scored: by reward.

    Rows that a reward refuses are bad rows too, and left out for every reward; more than `max_bad_share` of them, in
    the rows or in a rewrite, is an error.
    """

    pairs: Pairs
    report: BadRows
    max_bad_share: float
    rewritten: list[Rewritten]
    scored: dict[str, Scored] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)

    def __post_init__(self):
        if self.report.bad == self.report.total:
            self.report.check(self.max_bad_share)

    def score(self, reward: Reward) -> None:
        """Score the pairs and their rewrites. Raises as soon as too many rows are refused."""
        total = len(self.pairs) + sum(len(rewritten.pairs) for rewritten in self.rewritten)
        with tqdm(total=2 * total, unit="answer", desc=reward.name) as progress:
            started = time.perf_counter()
            found = score_pairs(reward, self.pairs, progress)
            rate = len(set(self.pairs.answers())) / (time.perf_counter() - started)
            self._refuse(reward.name, found)
            rewrites = {}
            for rewritten in self.rewritten:
                name = rewritten.rewrite.name
                rewrites[name] = score_pairs(reward, rewritten.pairs, progress)
                report = BadRows(f"{self.pairs.source}, rewritten by {name}", total=len(set(rewritten.pairs.rows)))
                _add(report, rewritten.pairs, rewrites[name], reward.name)
                if report.bad:
                    report.check(self.max_bad_share)
        self.scored[reward.name] = Scored(found, rewrites, *_unit(reward), rate)

    def kept(self) -> list[int]:
        """The indices of the pairs that every reward could score, once all have been asked; logs the others."""
        self.report.check(self.max_bad_share)
        return [index for index in range(len(self.pairs)) if index not in self.refused]

    def _refuse(self, name: str, found: PairScores) -> None:
        found.failed = [index for index in found.failed if index not in self.refused]
        rows = {self.pairs.rows[index] for index in found.failed}
        self.refused.update(index for index, row in enumerate(self.pairs.rows) if row in rows)
        _add(self.report, self.pairs, found, name)
        if self.report.share > self.max_bad_share:
            self.report.check(self.max_bad_share)


def _add(report: BadRows, pairs: Pairs, found: PairScores, name: str) -> None:
    for row in dict.fromkeys(pairs.rows[index] for index in found.failed):
        report.add(row, f"reward {name!r} refuses it (first: {found.reason})")


def _unit(reward: Reward) -> tuple[float, str]:
    normalizer = reward.normalizer if isinstance(reward, ClassifierReward | VllmReward) else None
    if normalizer is None:
        return 1.0, "the score"
    return normalizer.std, f"the score before normalisation (times {normalizer.std:.4g})"
