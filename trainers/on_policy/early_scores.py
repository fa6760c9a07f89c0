"""Scores that begin while completions are still drawn: those of the first ones are there when the last one comes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from align.reward_models.base import RewardOutput, score_together
from align.reward_models.early import EarlyRewards
from align.rollout.types import Completion, Rollout
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.samples import Sample, make_samples

if TYPE_CHECKING:
    from align.trainers.on_policy.pipeline import CompletionSource


class EarlyScores:
    """The completions of one call of an engine, and the scores of them that could begin.

    Args:
        asked: the prompt of every request. places: of the samples of each request among all that are scored together.
        weight_version: of the weights that the engine has. user_code: whether functions of users may be called
            meanwhile.
    """

    def __init__(
        self,
        rewards: RewardColumns,
        tokenizer,
        asked: Sequence[dict],
        places: Sequence[Sequence[int]],
        weight_version: int,
        *,
        user_code: bool,
    ):
        self.tokenizer, self.asked, self.places, self.weight_version = tokenizer, asked, places, weight_version
        self.told: dict[int, list[Completion]] = {}
        self.made: dict[int, list[Sample]] = {}
        prompts = {place: prompt for prompt, own in zip(asked, places, strict=True) for place in own}
        awaited = [Sample(prompts[place], [], "", [], False, weight_version) for place in range(len(prompts))]
        self.columns = rewards
        self.rewards = EarlyRewards(rewards.rewards, rewards.batch(awaited), user_code=user_code, partial=True)

    def done(self, request: int, completions: list[Completion]) -> None:
        """They are there (`RolloutEngine.generate`, `on_done`)."""
        samples = make_samples(self.tokenizer, self.asked[request], completions, self.weight_version)
        self.told[request], self.made[request] = completions, samples
        self.rewards.take(self.columns.batch(samples), self.places[request])

    def drawn(self, rollouts: Sequence[Rollout]) -> None:
        """The engine has returned these. Where it has not told of all of them as they are, as with a function around
        its `generate` that changes them, all are scored now."""
        told = [_written(self.told.get(request, ())) for request in range(len(rollouts))]
        if told != [_written(rollout.completions) for rollout in rollouts]:
            self.rewards.stop()
            self.made.clear()
            self.told.clear()

    def outputs(self, samples: list[Sample]) -> list[RewardOutput]:
        """Of every reward, once all samples are there (`drawn`)."""
        batch = self.columns.batch(samples)
        return self.rewards.outputs(batch) if self.told else score_together(self.columns.rewards, batch, partial=True)


def _written(completions: Sequence[Completion]) -> list[tuple[list[int], str]]:
    return [(completion.token_ids, completion.finish_reason) for completion in completions]


@contextmanager
def early_scores(
    engine: "CompletionSource",
    rewards: RewardColumns,
    tokenizer,
    asked: Sequence[dict],
    places: Sequence[Sequence[int]],
) -> Iterator[EarlyScores | None]:
    """Around a call of the engine and the scoring. None where nothing can be scored before all is drawn: the engine
    does not say what is done, or no reward can.

    While an engine draws in this process, functions of users wait: it puts the random states back that they may have
    drawn from.
    """
    if not (asked and getattr(engine, "tells", False)):
        yield None
        return
    version, user_code = engine.weight_version, engine.draws_elsewhere
    scores = EarlyScores(rewards, tokenizer, asked, places, version, user_code=user_code)
    try:
        yield scores if scores.rewards.begun else None
    except BaseException:
        scores.rewards.stop(wait=False)
        raise
    scores.rewards.stop()
