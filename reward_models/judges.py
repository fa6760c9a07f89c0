"""Judges of pairs: functions, servers and the policy itself, asked in both orders; and the reward that they make."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

import numpy as np
import torch

from align.errors import ConfigError, RewardError
from align.objectives.judging import members_of, pairs_within, win_rates
from align.reward_models.base import Reward, RewardBatch, RewardOutput
from align.reward_models.beside import Flight, Threads
from align.reward_models.calls import plain
from align.reward_models.early import Early, EarlyPieces, at_once
from align.reward_models.failures import Failed, Failures
from align.reward_models.judge_server import ServerJudge

ROUNDING = 1e-9  # 0.55 is farther from 0.5 than 0.05, and 0.45 is not
WORDS = {"first": 1.0, "second": 0.0, "tie": 0.5}
# (prompts, first, second), lists of one length -> a verdict per pair: "first", "second", "tie", the probability that
# the first is better, or None for want of one. Prompts are texts or messages as in the data, the other two texts.
Judge = Callable[[list, list[str], list[str]], Sequence[Any]]


@dataclass
class Judged:
    """preference: that the first is better, [M] in [0, 1], NaN without a verdict. consistent: whether it was judged
    alike in both orders, [M], NaN where one of them has no verdict or was not asked for."""

    preference: np.ndarray
    consistent: np.ndarray


def ask(judge: Judge, prompts: list, first: list[str], second: list[str], name: str, *, swap: bool = True) -> Judged:
    """What a judge says of pairs. RewardError naming the judge and the pair for what is no verdict.

    With `swap` every pair is asked about twice, either answer first, and the preference is the mean: who only prefers a
    position finds ties. Where one order has no verdict the other one counts alone.
    """
    forward = _verdicts(judge(prompts, first, second), len(prompts), name)
    if not swap:
        return Judged(forward, np.full(len(prompts), np.nan))
    backward = 1 - _verdicts(judge(prompts, second, first), len(prompts), name)
    preference = np.where(np.isnan(forward), backward, np.where(np.isnan(backward), forward, (forward + backward) / 2))
    alike = (np.sign(forward - 0.5) == np.sign(backward - 0.5)).astype(float)
    return Judged(preference, np.where(np.isnan(forward) | np.isnan(backward), np.nan, alike))


def _verdicts(found: Sequence[Any], count: int, name: str) -> np.ndarray:
    if not isinstance(found, Iterable):
        raise RewardError(f"judge {name!r} returned {type(found).__name__}, not a list with a verdict for each pair")
    values = [WORDS.get(value, value) if isinstance(value, str) else value for value in map(plain, found)]
    for index, value in enumerate(values):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise RewardError(
                f"judge {name!r}, pair {index}: expected 'first', 'second', 'tie' or a probability, got {value!r:.80}"
            )
    if len(values) != count:
        raise RewardError(f"judge {name!r} returned {len(values)} verdicts for {count} pairs")
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


@dataclass
class Pairs:
    """The pairs of completions of one prompt: indices of either side, the texts by index, and the numbers of the pairs
    whose texts differ, which are asked about."""

    first: list[int]
    second: list[int]
    texts: dict[int, str]
    differ: list[int]

    @classmethod
    def of(cls, batch: RewardBatch, indices: Sequence[int]) -> "Pairs":
        sides = pairs_within([cast(list[int], batch.groups)[index] for index in indices])
        first, second = ([indices[place] for place in side] for side in sides)
        texts = {index: as_text(batch.completions[index]) for index in indices}
        differ = [pair for pair, (i, j) in enumerate(zip(first, second, strict=True)) if texts[i] != texts[j]]
        return cls(first, second, texts, differ)

    @property
    def asked(self) -> list[tuple[int, int]]:
        return [(self.first[pair], self.second[pair]) for pair in self.differ]


class JudgeReward(Reward):
    """How often a completion is preferred to the others of its prompt, in [0, 1]
    (`align.objectives.judging.win_rates`).

    It compares what stands together, so it is a reward of training on prompts alone: everywhere else the batch does not
    say which completions are of one prompt, and it refuses. Equal texts are ties that nobody is asked about; a
    completion without another beside it (evaluations draw one per prompt) has the score 0.5, as against itself.

    Args:
        judge: `Judge`. name: in metrics and errors.
        swap: ask in both orders. tie_margin: preferences at most so far from 1/2 are ties.
        max_error_share: of the last 1,000 pairs, how many may be without a verdict (0.1); more end the run. A
            completion none of whose pairs has a verdict is left out.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        name: str,
        swap: bool = True,
        tie_margin: float = 0.0,
        max_error_share: float | None = None,
    ):
        if not 0 <= tie_margin < 0.5:
            raise ConfigError(f"reward {name!r}: tie_margin must be at least 0 and below 0.5, got {tie_margin}")
        self.judge, self.name, self.swap, self.tie_margin = judge, name, swap, tie_margin
        self.failures = Failures(name, "mask", max_error_share=max_error_share)

    def begin(self, batch: RewardBatch, *, user_code: bool) -> Early | None:
        return None if batch.groups is None or not self._beside else self._early(batch.copied())

    @property
    def _beside(self) -> bool:
        """Whether the judge is asked about single pairs, beside this thread."""
        return isinstance(self.judge, ServerJudge) and type(self.judge).__call__ is ServerJudge.__call__

    def _score(self, batch: RewardBatch) -> RewardOutput:
        if batch.groups is None:
            raise RewardError(
                f"reward {self.name!r} is a judge, which compares the completions of one prompt with each other: it "
                "ranks in training on prompts (align online_dpo, grpo ...), and here single completions are scored. "
                "Use align compare --judge for two sets of answers"
            )
        if self._beside:
            return at_once(self._early(batch))
        return self._compared(batch, self.judge, [range(len(batch))])

    def _early(self, batch: RewardBatch) -> Early:
        """Of a judge behind a server: its pairs, as soon as all completions of a prompt are there."""
        judge, groups = cast(ServerJudge, self.judge), list(members_of(cast(list[int], batch.groups)).values())

        def work(number: int, indices: Sequence[int]) -> list[Callable[[], float | None]]:
            pairs = Pairs.of(batch, indices)
            asked = [*pairs.asked, *((j, i) for i, j in pairs.asked if self.swap)]
            return [
                functools.partial(
                    judge.one, batch.prompts[i], pairs.texts[i], pairs.texts[j], batch.row_names(sorted((i, j)))
                )
                for i, j in asked
            ]

        def join(flight: Flight) -> RewardOutput:
            verdicts = iter(flight.results())
            return self._compared(batch, lambda prompts, *_: [next(verdicts) for _ in prompts], groups)

        return EarlyPieces(batch, groups, Flight(Threads(judge.concurrency)), work, join)

    def _compared(self, batch: RewardBatch, judge: Judge, parts: Sequence[Sequence[int]]) -> RewardOutput:
        """parts: completions whose pairs the judge is asked about at once."""
        every = [Pairs.of(batch, indices) for indices in parts]
        preferences, judged = [], [Judged(np.empty(0), np.empty(0))]
        for pairs in every:
            preference = np.full(len(pairs.first), 0.5)
            if pairs.differ:
                a, b = ([pairs.texts[pair[side]] for pair in pairs.asked] for side in (0, 1))
                found = ask(judge, [batch.prompts[i] for i, _ in pairs.asked], a, b, self.name, swap=self.swap)
                verdicts = [Failed("no verdict") if np.isnan(value) else value for value in found.preference]
                self.failures.count(verdicts, [i for i, _ in pairs.asked], batch)
                near = np.abs(found.preference - 0.5) <= self.tie_margin + ROUNDING
                preference[pairs.differ] = np.where(near, 0.5, found.preference)
                judged.append(found)
            preferences.append(preference)
        first, second = ([index for pairs in every for index in getattr(pairs, side)] for side in ("first", "second"))
        whole = Judged(
            *(np.concatenate([getattr(each, name) for each in judged]) for name in ("preference", "consistent"))
        )
        return self._output(batch, first, second, np.concatenate(preferences), whole)

    def _output(self, batch: RewardBatch, first, second, preference: np.ndarray, found: Judged) -> RewardOutput:
        scores = win_rates(first, second, torch.from_numpy(preference), len(batch))
        paired = torch.zeros(len(batch), dtype=torch.bool)
        paired[[*first, *second]] = True
        scores[~paired] = 0.5
        failed = scores.isnan()
        missing = np.isnan(preference)
        metrics = {
            "ties": (preference[~missing] == 0.5).astype(float).tolist(),
            "no_verdict": np.isnan(found.preference).astype(float).tolist(),
            "consistent": found.consistent[~np.isnan(found.consistent)].tolist(),
        }
        return RewardOutput(scores, failed=failed if failed.any() else None, metrics=metrics)


def as_text(completion: Any) -> str:
    """What a judge reads of a completion: the text, or the contents of its messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)
