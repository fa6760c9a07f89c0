"""Rollouts that are drawn before they are due: while the one before is trained on (`rollouts_ahead: 1`), and in parts
(`partial_rollouts`)."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from align.distributed.ranks import in_all
from align.errors import ConfigError, TrainingError
from align.rollout.types import Completion, Rollout, plain
from align.trainers.on_policy.early_scores import Expect
from align.trainers.on_policy.engine import SyncedEngine
from align.trainers.on_policy.parts import Drawn, Part, draw_parts
from align.trainers.on_policy.pipeline import RolloutPipeline

if TYPE_CHECKING:
    from align.trainers.on_policy.config import OnPolicyConfig

logger = logging.getLogger(__name__)
Prompts = tuple[list[dict], list[int]]  # and their indices in the rollout's global batch
PATIENCE = 10.0  # seconds that a call which is given up has to end; it only closes its connections
ELSEWHERE = (
    "rollouts_ahead draws while the policy trains, which needs an engine outside this process: set rollout: {backend: "
    "server, urls: [...]} (docs/rollouts.md, vLLM servers)"
)


class RolloutsAhead:
    """Completions for the loop, drawn when they are needed or before.

    With `ahead` the engine has the weights of the rollout that is trained on, and draws the next one from them in a
    thread that waits for it. So the first rollout is of the policy itself, and each other one of the weights one
    rollout older.

    With `parts` the engine draws several rollouts in one call: what is left of the one that is due, and a part of each
    of the `parts - 1` that follow, which go on by the weights of later rollouts.

    An epoch's first prompts are not known before it begins: its first rollout is drawn when it is needed.

    Args:
        args: `rollouts_ahead` (here `ahead`), `partial_rollouts` (here `parts`: 1, all at once) and the optimiser's
            steps per rollout.
        processes: of the run; each draws for its own prompts.
    """

    def __init__(self, args: "OnPolicyConfig", pipeline: RolloutPipeline, engine: SyncedEngine, *, processes: int):
        self.ahead, self.parts, self.steps = args.rollouts_ahead, args.partial_rollouts, args.steps_per_rollout
        self.pipeline, self.engine, self.processes, self.recorder = pipeline, engine, processes, pipeline.recorder
        self.forget()

    @property
    def on(self) -> bool:
        """Whether tokens may be of older weights than those of their rollout's first step."""
        return bool(self.ahead) or self.parts > 1

    def forget(self) -> None:
        """What was drawn and taken ahead is of another run."""
        self.drawn: list[Drawn] = []  # for the rollouts that come, in order
        self.upcoming: list[Prompts] = []  # of them
        self._answer: Future[None] | None = None
        self._thread: threading.Thread | None = None

    def prompts(self, take: Callable[[], Prompts], left: int) -> Prompts:
        """The prompts of a rollout. take: takes the next ones from the epoch. left: rollouts that follow it."""
        found = self.upcoming.pop(0) if self.upcoming else take()
        while found[0] and len(self.upcoming) < min(left, self.ahead + self.parts - 1):
            further = take()
            if not further[0]:
                break
            self.upcoming.append(further)
        return found

    def begin(self, prompts: list[dict], step: int, sync: Callable[[], None]) -> int:
        """Before `draw`: the version of the weights that draw the first tokens of this rollout. sync: waits (`wait`),
        and gives the engine the weights of now. All processes must call it."""
        sync()
        if not self.drawn:
            return step
        self._check(self.drawn[0], prompts, step)
        return self.drawn[0].version

    def draw(self, prompts: list[dict], indices: list[int], step: int, expect: Expect | None = None) -> list[Rollout]:
        """The completions of this rollout; with `ahead` the next ones are under way when it returns."""
        if not self.on:
            return self.pipeline.draw(prompts, indices, step, expect)
        if not (self.ahead and self.drawn):
            now = [(prompts, indices), *([] if self.ahead else self.upcoming)]
            each = [[prompt] * request.n for prompt in prompts for request in self.pipeline.requests]
            told = None if expect is None else expect(each)
            draw_parts(self.engine, self._plan(now, step, step), step, told)
        due = self.drawn.pop(0)
        if self.ahead and self.upcoming:
            self._start(step)
        self._record(due, step)
        assert due.rollouts is not None
        return due.rollouts

    def _plan(self, rollouts: list[Prompts], first: int, version: int) -> list[Part]:
        """What is drawn now of these rollouts. first: the step of the first of them, of which all is."""
        for number in range(len(self.drawn), len(rollouts)):
            self.drawn.append(Drawn(first + number * self.steps, version))
        longest = max(request.max_tokens for request in self.pipeline.requests)
        parts: list[Part] = []
        for drawn, (prompts, indices) in zip(self.drawn, rollouts, strict=False):
            asked = [prompt["prompt_ids"] for prompt in prompts for _ in self.pipeline.requests]
            requests = list(zip(asked, self.pipeline.params(indices, drawn.step), strict=True))
            parts.append(Part(drawn, requests, -(-longest // self.parts) if parts else None))
        return parts

    def _check(self, drawn: Drawn, prompts: list[dict], step: int) -> None:
        requests = len(self.pipeline.requests)
        asked = [prompt["prompt_ids"] for prompt in prompts for _ in range(requests)]
        if drawn.step != step or [rollout.prompt_ids for rollout in drawn.rollouts or ()] != asked:
            raise TrainingError(
                f"the completions that were drawn ahead are for other prompts than those of step {step + 1}: resume "
                "with the settings and the data of the run, or allow the change of rollouts_ahead to 0 and "
                "partial_rollouts to 1"
            )

    def _record(self, due: Drawn, step: int) -> None:
        """How old the weights were that drew the tokens."""
        made = [completion for rollout in due.rollouts or () for completion in rollout.completions]
        tokens: dict[int, int] = {}
        for completion in made:
            for version, count in completion.drawn_by or ():
                tokens[step - version] = tokens.get(step - version, 0) + count
        total = sum(tokens.values())
        self.recorder.record("rollout/staleness", sum(age * n for age, n in tokens.items()) / total, total)
        if self.parts > 1:
            for completion in made:
                self.recorder.record("rollout/unfinished_ratio", len(completion.drawn_by or ()) > 1)
            for age in range(self.ahead + self.parts):
                share = tokens.get(age * self.steps, 0) / total
                self.recorder.record(f"rollout/share_{age}_rollouts_old", share, total)

    def _start(self, step: int) -> None:
        if not self.engine.current.draws_elsewhere:
            raise ConfigError(f"{ELSEWHERE}; {self.engine.name} is in it", key="rollouts_ahead")
        answer: Future[None] = Future()
        parts = self._plan(self.upcoming, step + self.steps, step)

        def work() -> None:
            try:
                draw_parts(self.engine, parts, step)
                answer.set_result(None)
            except BaseException as error:  # raised where it is waited for
                answer.set_exception(error)

        self._answer = answer
        # a daemon: an interrupted process does not wait for completions
        self._thread = threading.Thread(target=work, name="align-rollouts-ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way: before every push, evaluation and checkpoint. Raises what the engine raised, in
        all processes, which must all call it: none pushes while another's requests are under way."""
        if self.ahead:
            with self.recorder.phase("generate"):
                in_all(self._finish)

    def _finish(self) -> None:
        if self._answer is not None:
            self._answer.result()
            self._answer = self._thread = None

    def raise_early(self) -> None:
        """Between micro-batches: a failure of the engine ends the run now, not at the end of the step."""
        if self._answer is not None and self._answer.done():
            self._answer.result()

    def stop(self) -> None:
        """Give up what is under way, if anything is, without waiting for it."""
        if self._thread is not None and self.engine.current.interrupt():
            self._thread.join(PATIENCE)
        self.forget()

    def state_dict(self) -> dict | None:
        """What is drawn for the rollouts that come, plain values; None if nothing is. All processes must call it."""
        self.wait()
        drawn = plain(self.drawn)
        return {"processes": self.processes, "drawn": drawn} if drawn else None

    def load_state_dict(self, state: dict | None) -> None:
        if state is None or not self.on:
            return
        if state["processes"] != self.processes:
            logger.warning(
                "%d processes drew what comes next ahead, and %d go on: it is drawn anew, by the weights of now",
                state["processes"],
                self.processes,
            )
            return
        self.drawn = [
            Drawn(one["step"], one["version"], [restored(rollout) for rollout in one["rollouts"]])
            for one in state["drawn"]
        ]


def restored(rollout: dict) -> Rollout:
    """A rollout of `plain`."""
    made = [Completion(**completion) for completion in rollout["completions"]]
    return Rollout(rollout["prompt_ids"], made, rollout["weight_version"])


def check_ahead(args: "OnPolicyConfig") -> None:
    """Raises `ConfigError` for what cannot be drawn ahead, or in parts."""
    if args.rollouts_ahead not in (0, 1):
        raise ConfigError(f"rollouts_ahead must be 0 or 1, got {args.rollouts_ahead}", key="rollouts_ahead")
    if args.rollouts_ahead and args.engine_options.backend in ("auto", "vllm", "transformers"):
        raise ConfigError(f"{ELSEWHERE}, not backend: {args.engine_options.backend}", key="rollouts_ahead")
    if args.partial_rollouts > args.max_completion_length:
        raise ConfigError(
            f"partial_rollouts cuts the {args.max_completion_length} tokens of max_completion_length into "
            f"{args.partial_rollouts} parts, which leaves no token for some: lower it",
            key="partial_rollouts",
        )
    name = "rollouts_ahead" if args.rollouts_ahead else "partial_rollouts" if args.partial_rollouts > 1 else None
    if name is None:
        return
    off = f"{name}: {0 if args.rollouts_ahead else 1}"
    if args.rollout_correction == "none":
        raise ConfigError(
            f"with {name} the samples are of older weights than those that learn from them: set rollout_correction, "
            "such as token_truncate, which weighs them by the ratio",
            key=name,
        )
    if args.dynamic_sampling_rounds:
        raise ConfigError(
            "dynamic_sampling_rounds draws again, whole completions, when the scores are known, and the step would "
            f"wait for what {name} draws before: set {off}, or dynamic_sampling_rounds: 0",
            key=name,
        )
    if args.threshold_search is not None:
        raise ConfigError(
            f"threshold_search puts earlier weights back, and what was drawn before would be of others: set {off}",
            key=name,
        )
