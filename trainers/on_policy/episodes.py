"""Completions of several turns: a policy and an environment, or tools, take turns within one completion.

All conversations of a call go round together: one engine call completes every one that still goes on, then each
environment replies. A completion is one sequence of tokens, the policy's as it drew them and the environment's as the
chat template writes them, with a mask that tells which is whose; `max_completion_length` is for all of it.

It ends when the environment is done, at an answer without a tool call where there is no other environment, or after
`max_turns` answers; then it counts as ended. It counts as cut when an answer reaches the length limit, or when the next
turn and one token more would.
"""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from align.data.checks import template_kwargs
from align.data.encode import encode, render
from align.data.ending import written_text
from align.errors import ConfigError, RolloutError
from align.reward_models.base import own_copy
from align.reward_models.deadlines import DeadlineExceeded
from align.rollout.seeds import derive_seed
from align.rollout.types import Completion, Episode, Rollout, SamplingParams
from align.trainers.core.loading import training_tokenizer
from align.trainers.on_policy.environments import (
    PICKS,
    EnvironmentFailure,
    EnvironmentReward,
    Environments,
    Kind,
    Session,
    environments_of,
)
from align.trainers.on_policy.tool_calls import reader_for
from align.trainers.on_policy.turn_tokens import TurnTokens

if TYPE_CHECKING:
    from align.trainers.on_policy.early_scores import Expect
    from align.trainers.on_policy.pipeline import CompletionSource

NOT_AHEAD = (
    "environments and tools answer whole completions, in the trainer's own process, and %s draws them in parts or "
    "while it trains: leave it out"
)


@dataclass
class Talk:
    """One conversation while it goes on. place: number of its request in the call, and of the sample in the request."""

    prompt: dict
    params: SamplingParams
    place: tuple[int, int]
    session: Session
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    messages: list[dict] = field(default_factory=list)
    turns: int = 0
    cut: bool = False
    finished: bool = False
    reward: float | None = None
    failure: str | None = None
    version: int = 0

    @property
    def left(self) -> int:
        """Tokens until the limit."""
        return self.params.max_tokens - len(self.ids)

    def request(self) -> SamplingParams:
        """Of the next answer. Its draws depend on the run's seed, the prompt, the sample and the turn alone."""
        seed, least = self.params.seed, min(self.params.min_tokens, self.left)
        turn = None if seed is None else derive_seed(seed, "turn", self.place[1], self.turns)
        return replace(self.params, n=1, max_tokens=self.left, min_tokens=least, seed=turn)

    def add(self, ids: list[int], logps: list[float] | None, *, own: bool) -> None:
        self.ids += ids
        self.mask += [int(own)] * len(ids)
        self.logps += logps or [0.0] * len(ids)

    def completion(self) -> Completion:
        tools = self.session.tools
        episode = Episode(
            self.mask,
            self.messages,
            self.prompt,
            self.turns,
            self.reward,
            self.failure,
            self.finished,
            tools.called,
            tools.failed,
            self.session.of.name,
            self.session.environment,
        )
        logps = None if self.params.greedy else self.logps
        return Completion(self.ids, logps, "length" if self.cut else "stop", episode)


class Episodes:
    """Holds the conversations of a run.

    Args:
        max_turns: answers of the policy; None: as many as there is room for. stops: whether a failure of an environment
            ends the run; else the completion is left out.
        template_options: further variables of the chat template, for all prompts.
    """

    def __init__(
        self,
        environments: Environments,
        tokenizer,
        *,
        max_turns: int | None = None,
        max_prompt_length: int | None = None,
        stops: bool = True,
        template_options: dict | None = None,
    ):
        self.environments, self.tokenizer, self.template_options = environments, tokenizer, template_options or {}
        self.max_turns, self.max_prompt_length, self.stops = max_turns, max_prompt_length, stops
        self.open: list[Session] = []  # that are to be closed
        # of all prompts; with several environments each prompt is written when its conversation starts
        self.schemas = [] if environments.several else environments.kinds[None].tools.schemas
        for kind in environments.kinds.values():
            if kind.tools.schemas:
                kind.tools.read = reader_for(tokenizer, kind.tools.schemas)  # first: it says what templates write
        self.turn_tokens = TurnTokens(tokenizer, environments.roles)
        self.maskable = all(kind.scores for kind in environments.kinds.values())
        if not stops and not self.maskable:
            raise ConfigError("environment_on_error: mask is for environments with a reward of their own")

    @property
    def rewards(self) -> list[EnvironmentReward]:
        """The environments' own, as further rewards."""
        return [EnvironmentReward(name, "stop" if self.stops else "mask") for name in self.environments.scores]

    def complete(
        self,
        engine: "CompletionSource",
        prompts: list[dict],
        params: list[SamplingParams],
        seeds: list[int],
        expect: "Expect | None" = None,
    ) -> list[Rollout]:
        """As `RolloutEngine.generate`, of rows with `prompt` and `prompt_ids`. seeds: of the environments, one for all
        samples of a request. expect: told of each conversation when it has ended, while others go on."""
        try:
            return self._complete(engine, prompts, params, seeds, expect)
        finally:
            while self.open:  # where something was raised: what environments hold outside is let go of
                with suppress(EnvironmentFailure):
                    self.open.pop().close()

    def _complete(
        self,
        engine: "CompletionSource",
        prompts: list[dict],
        params: list[SamplingParams],
        seeds: list[int],
        expect: "Expect | None",
    ) -> list[Rollout]:
        longer: dict[tuple[int, str], dict] = {}  # samples whose environments say the same share one prompt
        groups = [
            [self._start(prompt, own, seed, (number, i), longer) for i in range(own.n)]
            for number, (prompt, own, seed) in enumerate(zip(prompts, params, seeds, strict=True))
        ]
        told = None if expect is None else expect([[talk.prompt for talk in group] for group in groups])
        live, made = [talk for group in groups for talk in group], {}
        while engine.anyone(bool(live)):
            rollouts = engine.generate(
                [talk.prompt["prompt_ids"] + talk.ids for talk in live], [talk.request() for talk in live]
            )
            ended = [t for t, rollout in zip(live, rollouts, strict=True) if not self._goes_on(t, rollout)]
            for talk in ended:
                made[talk.place] = self._finish(talk)
                if told is not None:
                    told(talk.place[0], [made[talk.place]], talk.place[1])
            live = [talk for talk in live if talk.place not in made]
        return [
            Rollout(prompt["prompt_ids"], [made[talk.place] for talk in group], group[0].version)
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def _start(self, prompt: dict, params: SamplingParams, seed: int, place: tuple[int, int], longer: dict) -> Talk:
        if isinstance(prompt["prompt"], str):
            raise RolloutError(
                "environments and tools take conversations, and the prompts are plain texts: write each as "
                '[{"role": "user", "content": ...}]'
            )
        kind = self.environments.kind_of(prompt)
        if kind.steps and self.turn_tokens.moves_system and prompt["prompt"][0]["role"] == "system":
            raise RolloutError(
                f"the prompt of row {prompt.get('row')} has a system message, which this chat template moves before "
                "the last question once one follows an answer: put that text at the start of the first user message"
            )
        try:
            session = kind.start()
        except DeadlineExceeded:
            raise RolloutError(
                f"a new environment {kind.name} was not made within environment_timeout ({kind.timeout:g} s)"
            ) from None
        except (Exception, SystemExit) as error:  # the user's code raises anything
            raise RolloutError(
                f"a new environment {kind.name} could not be made: {type(error).__name__}: {error}"
            ) from error
        self.open.append(session)
        talk = Talk(prompt, params, place, session)
        kept_back = {"prompt_ids", PICKS} if self.environments.several else {"prompt_ids"}
        # all samples of a prompt have one row, which an environment may take things from while it plays
        row = {key: own_copy(value) for key, value in prompt.items() if key not in kept_back}
        try:
            added = session.reset({**row, "environment_seed": seed})
        except EnvironmentFailure as failure:
            self._failed(talk, failure)
            return talk
        if added or (self.environments.several and kind.tools.schemas):
            key = id(prompt), added or ""
            if key not in longer:
                longer[key] = self._with_text(prompt, added or "", kind)
            talk.prompt = longer[key]
        if not (talk.prompt["prompt"][-1]["content"].strip() or kind.tools.schemas):
            raise RolloutError(
                f"the prompt of row {prompt.get('row')} ends in an empty message, and reset of {kind.name} adds nothing"
            )
        return talk

    def _options(self, prompt: dict, kind: Kind) -> dict:
        described = {"tools": kind.tools.schemas} if kind.tools.schemas else {}
        return {**self.template_options, **described, **template_kwargs(prompt)}

    def _with_text(self, prompt: dict, text: str, kind: Kind) -> dict:
        """The row with a text after its last message, and with the tools of its environment."""
        last = prompt["prompt"][-1]
        messages = [*prompt["prompt"][:-1], {**last, "content": last["content"] + text}]
        rendered = render(messages, self.tokenizer, self._options(prompt, kind), answer_next=True)
        ids = encode(self.tokenizer, [(rendered, [])], add_bos=False)[0].prompt_ids
        if self.max_prompt_length is not None and len(ids) > self.max_prompt_length:
            raise RolloutError(
                f"the prompt of row {prompt.get('row')} has {len(ids)} tokens with what its environment adds, more "
                f"than max_prompt_length={self.max_prompt_length}: raise it, or return less"
            )
        return {**prompt, "prompt": messages, "prompt_ids": ids}

    def _goes_on(self, talk: Talk, rollout: Rollout) -> bool:
        """Takes an answer, and the environment's reply to it."""
        (answer,) = rollout.completions
        talk.version = rollout.weight_version
        talk.add(answer.token_ids, answer.logprobs, own=True)
        talk.turns += 1
        talk.cut = answer.finish_reason == "length"
        text = written_text(self.tokenizer, answer.token_ids, not talk.cut)
        talk.messages.append({"role": "assistant", "content": text})
        if talk.cut or talk.failure is not None:
            return False
        try:
            reply = talk.session.reply(text)
        except EnvironmentFailure as failure:
            self._failed(talk, failure)
            return False
        talk.finished = reply.done
        if reply.done or talk.turns == self.max_turns:
            return False
        between = self.turn_tokens.between(
            reply.messages, answer.token_ids[-1], self._options(talk.prompt, talk.session.of)
        )
        talk.cut = len(between) >= talk.left
        if not talk.cut:
            talk.add(between, None, own=False)
            talk.messages += reply.messages
        return not talk.cut

    def _finish(self, talk: Talk) -> Completion:
        try:
            if talk.failure is None:
                talk.reward = talk.session.finish()
            self.open.remove(talk.session)
            talk.session.close()
        except EnvironmentFailure as failure:
            self._failed(talk, failure)
        return talk.completion()

    def _failed(self, talk: Talk, failure: EnvironmentFailure) -> None:
        talk.failure = str(failure)
        if self.stops:
            masks = ". environment_on_error: mask leaves such completions out" if self.maskable else ""
            raise RolloutError(
                f"environment {talk.session.of.name}, row {talk.prompt.get('row')} of the dataset, after "
                f"{talk.turns} answers: {failure}{masks}"
            ) from failure


def make_episodes(args, tools, factory, tokenizer) -> Episodes | None:
    """Of a configuration (`OnPolicyConfig`) and a trainer's arguments; None where completions are of one turn."""
    environments = environments_of(args, tools, factory)
    if environments is None:
        return None
    for name, asked in (("rollouts_ahead", args.rollouts_ahead), ("partial_rollouts", args.partial_rollouts > 1)):
        if asked:
            raise ConfigError(NOT_AHEAD % name, key=name)
    return Episodes(
        environments,
        training_tokenizer(tokenizer),
        max_turns=args.max_turns,
        max_prompt_length=args.max_prompt_length,
        stops=args.environment_on_error == "stop",
        template_options=args.chat_template_kwargs,
    )
