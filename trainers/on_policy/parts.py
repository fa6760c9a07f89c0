"""Completions that are drawn in parts, each by the weights of its time (`partial_rollouts`).

A part is a request of its own: the prompt and the tokens so far are its prompt, which the engine reads once more. No
request is interrupted and no clock decides, so that what is drawn by which weights follows from the options alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from align.errors import RolloutError
from align.rollout.seeds import derive_seed
from align.rollout.types import Completion, Rollout, SamplingParams
from align.trainers.on_policy.pipeline import CompletionSource

if TYPE_CHECKING:
    from align.trainers.on_policy.early_scores import Told

Request = tuple[list[int], SamplingParams]


@dataclass
class Drawn:
    """The completions of a rollout's prompts, before they are scored.

    step: of the optimiser, that they are for. version: of the weights that drew their first tokens. rollouts: the
    engine's answers so far; None where it is still to be asked.
    """

    step: int
    version: int
    rollouts: list[Rollout] | None = None


@dataclass
class Part:
    """What is drawn now of a rollout.

    requests: the prompts and parameters of all its completions, whole. most: tokens that each of them may get now;
    None: all that it has room for.
    """

    drawn: Drawn
    requests: list[Request]
    most: int | None

    def asks(self) -> Iterator[tuple[int, int | None, Request]]:
        """Number of the request, number of its sample (None: all of them), and what the engine is asked."""
        for i, (ids, params) in enumerate(self.requests):
            if self.drawn.rollouts is None:
                yield i, None, (ids, shorter(params, 0, self.most))
                continue
            for j, made in enumerate(self.drawn.rollouts[i].completions):
                if unfinished(made, params):
                    left = shorter(params, len(made.token_ids), self.most)
                    seed = None if params.seed is None else derive_seed(params.seed, "part", j, len(made.token_ids))
                    yield i, j, (ids + made.token_ids, replace(left, n=1, seed=seed))

    def take(self, answers: list[tuple[int, int | None, Rollout]]) -> None:
        """answers: to `asks`, in order."""
        if self.drawn.rollouts is None:
            self.drawn.rollouts = [rollout for _, _, rollout in answers]
            for rollout in self.drawn.rollouts:
                for made in rollout.completions:
                    made.drawn_by = [(rollout.weight_version, len(made.token_ids))]
            return
        for i, j, rollout in answers:
            assert j is not None
            (more,) = rollout.completions
            made = self.drawn.rollouts[i].completions[j] = self.longer(i, j, more)
            made.drawn_by = [*(made.drawn_by or []), (rollout.weight_version, len(more.token_ids))]

    def longer(self, i: int, j: int, more: Completion) -> Completion:
        """Sample j of request i, with what was drawn after it."""
        assert self.drawn.rollouts is not None
        made = self.drawn.rollouts[i].completions[j]
        logprobs = None if made.logprobs is None else made.logprobs + (more.logprobs or [])
        ids = made.token_ids + more.token_ids
        return replace(made, token_ids=ids, logprobs=logprobs, finish_reason=more.finish_reason)

    def whole(self) -> Iterator[tuple[int, int, Completion]]:
        """What needs no further tokens: numbers of the request and of the sample, completion."""
        for i, ((_, params), rollout) in enumerate(zip(self.requests, self.drawn.rollouts or (), strict=False)):
            for j, made in enumerate(rollout.completions):
                if not unfinished(made, params):
                    yield i, j, made


def draw_parts(engine: CompletionSource, parts: list[Part], version: int, told: "Told | None" = None) -> None:
    """Draw all of them with one engine call. version: of the weights that the engine must have; raises `RolloutError`
    if it has others. told: of the first part's completions, all of which are drawn to their end."""
    asked = [(part, ask) for part in parts for ask in part.asks()]
    requests = [request for _, (_, _, request) in asked]
    tells = {}
    if told is not None:
        for i, j, made in parts[0].whole():
            told(i, [made], j)

        def done(index: int, completions: list[Completion]) -> None:
            part, (i, j, _) = asked[index]
            if part is parts[0]:
                told(i, completions if j is None else [part.longer(i, j, completions[0])], j or 0)

        tells["on_done"] = done
    answers = engine.generate([ids for ids, _ in requests], [params for _, params in requests], **tells)
    found = {rollout.weight_version for rollout in answers}
    if not found <= {version}:
        raise RolloutError(
            f"completions were asked of weights of version {version}, and those of version "
            f"{', '.join(map(str, sorted(found)))} made them: push the weights before"
        )
    for part in parts:
        part.take([(i, j, answer) for (of, (i, j, _)), answer in zip(asked, answers, strict=True) if of is part])


def unfinished(made: Completion, params: SamplingParams) -> bool:
    return made.finish_reason == "length" and len(made.token_ids) < params.max_tokens


def shorter(params: SamplingParams, had: int, most: int | None) -> SamplingParams:
    """Of a completion that has so many tokens and may get so many more now."""
    left = params.max_tokens - had
    now = left if most is None else min(most, left)
    return replace(params, max_tokens=now, min_tokens=min(now, max(0, params.min_tokens - had)))
