"""Scores that begin while completions are still drawn: those of the first ones are there when the last one comes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from align.reward_models.base import RewardOutput, score_together
from align.reward_models.early import EarlyRewards
from align.rollout.types import Completion, Episode
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.samples import Sample, make_samples

if TYPE_CHECKING:
    from align.trainers.on_policy.pipeline import CompletionSource


class Told(Protocol):
    """Is told that completions of a request are whole, in any order. first: the number of the first of them among the
    request's samples. An engine's `on_done`, which tells of all samples of a request at once."""

    def __call__(self, request: int, completions: list[Completion], first: int = 0) -> None: ...


class Expect(Protocol):
    """Is told the prompt of every sample of every request before anything is drawn. Returns what is to be told of the
    completions; None where no reward scores before all are there."""

    def __call__(self, prompts: Sequence[Sequence[dict]]) -> Told | None: ...


class EarlyScores:
    """The scores of completions that are drawn together, of which those begin that can.

    Args:
        places: of the samples of each request among all that are scored together.
        user_code: whether functions of users may be called before all are drawn.
        turns: whether completions are conversations of several turns.
    """

    def __init__(
        self,
        rewards: RewardColumns,
        tokenizer,
        places: Sequence[Sequence[int]],
        *,
        user_code: bool,
        turns: bool,
    ):
        self.columns, self.tokenizer, self.places = rewards, tokenizer, places
        self.user_code, self.turns = user_code, turns
        self.rewards: EarlyRewards | None = None
        self.told: dict[int, tuple[list[int], bool]] = {}

    def expect(self, prompts: Sequence[Sequence[dict]]) -> Told | None:
        """`Expect`."""
        self.prompts = prompts
        at = {
            place: p for own, each in zip(self.places, prompts, strict=True) for place, p in zip(own, each, strict=True)
        }
        episode = Episode([], [], {}, 0) if self.turns else None
        awaited = [Sample(at[place], [], "", [], False, 0, episode=episode) for place in range(len(at))]
        self.rewards = EarlyRewards(
            self.columns.rewards, self.columns.batch(awaited), user_code=self.user_code, partial=True
        )
        return self.done if self.rewards.begun else None

    def done(self, request: int, completions: list[Completion], first: int = 0) -> None:
        """`Told`."""
        assert self.rewards is not None  # `expect` comes before
        samples = make_samples(self.tokenizer, self.prompts[request][first], completions, 0)
        places = self.places[request][first : first + len(samples)]
        self.told |= {place: _written(sample) for place, sample in zip(places, samples, strict=True)}
        self.rewards.take(self.columns.batch(samples), places)

    def outputs(self, samples: list[Sample]) -> list[RewardOutput]:
        """Of every reward, once all samples are there. Where not all of them were told as they are, as with a function
        around `generate` of an engine that changes what it returns, all are scored now."""
        batch = self.columns.batch(samples)
        if self.rewards is not None and self.told == {place: _written(s) for place, s in enumerate(samples)}:
            return self.rewards.outputs(batch)
        self.stop()
        return score_together(self.columns.rewards, batch, partial=True)

    def stop(self, *, wait: bool = True) -> None:
        """As `Early.stop`."""
        if self.rewards is not None:
            self.rewards.stop(wait=wait)


def _written(sample: Sample) -> tuple[list[int], bool]:
    return list(sample.completion_ids), sample.truncated


@contextmanager
def early_scores(
    engine: "CompletionSource", rewards: RewardColumns, tokenizer, places: Sequence[Sequence[int]], *, turns: bool
) -> Iterator[EarlyScores | None]:
    """Around the drawing of completions and their scoring. None for an engine that does not say what is done.

    Functions of users wait while an engine draws in this process, as it puts the random states back that they may have
    drawn from, and while users' environments are called between the turns, which may draw from the same.
    """
    if not (places and getattr(engine, "tells", False)):
        yield None
        return
    scores = EarlyScores(rewards, tokenizer, places, user_code=engine.draws_elsewhere and not turns, turns=turns)
    try:
        yield scores
    except BaseException:
        scores.stop(wait=False)
        raise
    scores.stop()


def expecting(early: Sequence[EarlyScores]) -> Expect:
    """`EarlyScores.expect` of several."""

    def expect(prompts: Sequence[Sequence[dict]]) -> Told | None:
        begun = [told for scores in early if (told := scores.expect(prompts)) is not None]

        def done(request: int, completions: list[Completion], first: int = 0) -> None:
            for told in begun:
                told(request, completions, first)

        return done if begun else None

    return expect
