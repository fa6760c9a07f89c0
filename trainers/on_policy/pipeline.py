"""The rollout pipeline: prompts in, scored samples out."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from align.errors import RolloutError
from align.rollout.seeds import derive_seed
from align.rollout.types import OnDone, Rollout, SamplingParams
from align.trainers.core.recorder import Recorder
from align.trainers.on_policy.early_scores import EarlyScores, Expect, early_scores
from align.trainers.on_policy.episodes import Episodes
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.samples import Sample, make_samples
from align.trainers.on_policy.truncation import TruncationRule

KEEP = TruncationRule()


class CompletionSource(Protocol):
    """What the pipeline needs of a rollout engine; `draws_elsewhere` and `on_done` only of one that `tells`."""

    @property
    def tells(self) -> bool: ...

    @property
    def draws_elsewhere(self) -> bool: ...

    def generate(
        self, prompts: list[list[int]], params: list[SamplingParams], on_done: OnDone | None = None
    ) -> list[Rollout]: ...

    def anyone(self, wants: bool) -> bool: ...


Draw = Callable[[list[dict], list[int], int, Expect | None], list[Rollout]]
"""`RolloutPipeline.draw`."""


@dataclass
class ScoredRollout:
    """The completions of a rollout's prompts.

    samples: those that are trained on, each prompt's side by side. extra: per prompt, the completions of the further
    requests. weight_version: of the weights that made them.
    """

    samples: list[Sample]
    extra: list[list[Sample]]
    weight_version: int


class RolloutPipeline:
    """Asks the engine for completions and the rewards for scores.

    It holds no trainer, no trained model and no step count: what changes is passed to `run`, so that it can run ahead
    of training or in another process.

    Args:
        engine: a `RolloutEngine`, or any object with its `generate`.
        requests: what is asked for every prompt; the first is trained on (`Estimator.requests`).
        seed: of the run; each request's seed follows from it, the step, the prompt's index and the request's number.
        recorder: gets the seconds of the phases `generate`, and `score`, which is what is left to wait for then.
        truncation: what becomes of completions that are cut.
        episodes: where completions are conversations of several turns.
    """

    def __init__(
        self,
        engine: CompletionSource,
        tokenizer,
        rewards: RewardColumns,
        requests: list[SamplingParams],
        *,
        seed: int,
        recorder: Recorder,
        truncation: TruncationRule = KEEP,
        episodes: Episodes | None = None,
    ):
        self.engine, self.tokenizer, self.rewards, self.requests = engine, tokenizer, rewards, requests
        self.seed, self.recorder, self.truncation, self.episodes = seed, recorder, truncation, episodes

    def run(
        self,
        prompts: list[dict],
        indices: list[int],
        step: int,
        weight_version: int,
        draw: Draw | None = None,
    ) -> ScoredRollout:
        """Sample and score, with one engine call for all requests of all prompts.

        indices: of the prompts in the rollout's global batch, so that the draws do not depend on how it is cut into
        processes. step: of the optimiser, that the rollout is made for; it changes the draws. weight_version: of the
        weights that the engine must have; raises `RolloutError` if it has others. draw: in the place of the method.
        """
        with self._early(len(prompts)) as early:
            with self.recorder.phase("generate"):
                rollouts = (draw or self.draw)(prompts, indices, step, None if early is None else early.expect)
                rollout = self.samples(prompts, rollouts)
            if rollout.weight_version != weight_version:
                raise RolloutError(
                    f"the rollouts of step {step} were made by weights of version {rollout.weight_version}, and "
                    f"version {weight_version} was asked for: push the weights before"
                )
            every = rollout.samples + [sample for group in rollout.extra for sample in group]
            with self.recorder.phase("score"):
                logged, given = self.rewards.fill(every, early)
        for sample in every:
            if sample.episode is not None:
                sample.episode.played = None
        self.truncation.apply(every)
        for record, metrics in ((self.recorder.record, logged), (self.recorder.record_given, given)):
            for name, values in metrics.items():
                for value in values:
                    record(name, value)
        each = len(rollout.samples) // len(rollout.extra)
        for i, sample in enumerate(rollout.samples):  # a prompt whose baseline has no score, or was cut
            sample.masked |= not sample.left_out and any(other.masked for other in rollout.extra[i // each])
            sample.left_out |= any(other.left_out for other in rollout.extra[i // each])
        return rollout

    def _early(self, count: int) -> AbstractContextManager[EarlyScores | None]:
        """What scores completions of all requests of so many prompts while others are drawn."""
        counts = [request.n for request in self.requests]
        places, further = [], count * counts[0]  # the samples of all prompts, then what else was asked for each
        for i in range(count):
            places.append(range(i * counts[0], (i + 1) * counts[0]))
            for n in counts[1:]:
                places.append(range(further, further + n))
                further += n
        return early_scores(self.engine, self.rewards, self.tokenizer, places, turns=self.episodes is not None)

    def draw(self, prompts: list[dict], indices: list[int], step: int, expect: Expect | None = None) -> list[Rollout]:
        """Completions of every request of every prompt, side by side."""
        asked = [prompt for prompt in prompts for _ in self.requests]
        params = self.params(indices, step)
        if self.episodes is None:
            return complete(self.engine, asked, params, expect)
        seeds = [derive_seed(self.seed, "environment", step, index) for index in indices for _ in self.requests]
        return self.episodes.complete(self.engine, asked, params, seeds, expect)

    def params(self, indices: list[int], step: int) -> list[SamplingParams]:
        """Of every request of every prompt, side by side, with their seeds."""
        return [
            replace(request, seed=derive_seed(self.seed, "train", step, index, number))
            for index in indices
            for number, request in enumerate(self.requests)
        ]

    def samples(self, prompts: list[dict], rollouts: list[Rollout]) -> ScoredRollout:
        """Completions without scores. rollouts: of `draw`."""
        count = len(self.requests)
        samples, extra = [], []
        for i, prompt in enumerate(prompts):
            groups = [
                make_samples(self.tokenizer, prompt, rollout.completions, rollout.weight_version)
                for rollout in rollouts[i * count : (i + 1) * count]
            ]
            samples += groups[0]
            extra.append([sample for group in groups[1:] for sample in group])
        return ScoredRollout(samples, extra, rollouts[0].weight_version)


def complete(
    engine: CompletionSource, asked: list[dict], params: list[SamplingParams], expect: Expect | None
) -> list[Rollout]:
    """Completions of one turn, of rows with `prompt_ids`."""
    told = None if expect is None else expect([[row] * own.n for row, own in zip(asked, params, strict=True)])
    ids = [row["prompt_ids"] for row in asked]
    return engine.generate(ids, params) if told is None else engine.generate(ids, params, on_done=told)
