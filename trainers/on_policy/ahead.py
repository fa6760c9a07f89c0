"""Rollouts that are drawn while the one before is trained on (`rollouts_ahead: 1`)."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from align.errors import ConfigError, TrainingError
from align.rollout.server.ranks import in_all
from align.rollout.types import Completion, Rollout
from align.trainers.on_policy.engine import SyncedEngine
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


@dataclass
class Drawn:
    """The completions of a rollout's prompts, before they are scored.

    step: of the optimiser, that they are for. version: of the weights that drew them. rollouts: the engine's answer;
    None where it is still to be asked.
    """

    step: int
    version: int
    rollouts: list[Rollout] | None = None


class RolloutsAhead:
    """Completions for the loop, drawn when they are needed or, with `ahead`, one rollout before.

    With `ahead` the engine has the weights of the rollout that is trained on, and draws the next one from them in a
    thread that waits for it. So the first rollout is of the policy itself, and each other one of the weights one
    rollout older. An epoch's first prompts are not known before it begins: its first rollout is drawn when it is
    needed.

    Args:
        ahead: `rollouts_ahead`, 0 or 1.
        steps: optimiser steps per rollout.
        processes: of the run; each draws for its own prompts.
    """

    def __init__(self, ahead: int, pipeline: RolloutPipeline, engine: SyncedEngine, *, steps: int, processes: int):
        self.on, self.pipeline, self.engine = bool(ahead), pipeline, engine
        self.steps, self.processes, self.recorder = steps, processes, pipeline.recorder
        self.forget()

    def forget(self) -> None:
        """What was drawn and taken ahead is of another run."""
        self.drawn: Drawn | None = None  # for the next rollout
        self.upcoming: Prompts | None = None
        self._answer: Future[list[Rollout]] | None = None
        self._thread: threading.Thread | None = None

    def prompts(self, take: Callable[[], Prompts], more: bool) -> Prompts:
        """The prompts of a rollout. take: takes the next ones from the epoch. more: whether another rollout follows."""
        found, self.upcoming = self.upcoming or take(), None
        if self.on and more and found[0]:
            upcoming = take()
            self.upcoming = upcoming if upcoming[0] else None
        return found

    def draw(self, prompts: list[dict], indices: list[int], step: int, sync: Callable[[], None]) -> Drawn:
        """The completions of this rollout; the next one is under way when it returns. sync: waits (`wait`), and gives
        the engine the weights of now. All processes must call it."""
        sync()
        if not self.on:
            return Drawn(step, step)
        drawn, self.drawn = self.drawn, None
        if drawn is None:
            with self.recorder.phase("generate"):
                drawn = Drawn(step, step, self.pipeline.draw(prompts, indices, step))
        self._check(drawn, prompts, step)
        if self.upcoming is not None:
            self._start(*self.upcoming, step + self.steps, version=step)
        self.recorder.record("rollout/staleness", step - drawn.version, len(prompts))
        return drawn

    def _check(self, drawn: Drawn, prompts: list[dict], step: int) -> None:
        requests = len(self.pipeline.requests)
        asked = [prompt["prompt_ids"] for prompt in prompts for _ in range(requests)]
        if drawn.step != step or [rollout.prompt_ids for rollout in drawn.rollouts or ()] != asked:
            raise TrainingError(
                f"the completions that were drawn ahead are for other prompts than those of step {step + 1}: resume "
                "with the settings and the data of the run, or allow the change of rollouts_ahead to 0"
            )

    def _start(self, prompts: list[dict], indices: list[int], step: int, version: int) -> None:
        if not self.engine.current.draws_elsewhere:
            raise ConfigError(f"{ELSEWHERE}; {self.engine.name} is in it", key="rollouts_ahead")
        answer: Future[list[Rollout]] = Future()

        def work() -> None:
            try:
                answer.set_result(self.pipeline.draw(prompts, indices, step))
            except BaseException as error:  # raised where it is waited for
                answer.set_exception(error)

        self.drawn, self._answer = Drawn(step, version), answer
        # a daemon: an interrupted process does not wait for completions
        self._thread = threading.Thread(target=work, name="align-rollouts-ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way: before every push, evaluation and checkpoint. Raises what the engine raised, in
        all processes, which must all call it: none pushes while another's requests are under way."""
        if self.on:
            with self.recorder.phase("generate"):
                in_all(self._finish)

    def _finish(self) -> None:
        if self._answer is not None:
            assert self.drawn is not None
            self.drawn.rollouts = self._answer.result()
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
        """What is drawn for the next rollout, plain values; None if nothing is. All processes must call it."""
        self.wait()
        return None if self.drawn is None else {"processes": self.processes, **asdict(self.drawn)}

    def load_state_dict(self, state: dict | None) -> None:
        if state is None or not self.on:
            return
        if state["processes"] != self.processes:
            logger.warning(
                "%d processes drew the next rollout ahead, and %d go on: it is drawn anew, by the weights of now",
                state["processes"],
                self.processes,
            )
            return
        rollouts = [
            Rollout(one["prompt_ids"], [Completion(**each) for each in one["completions"]], one["weight_version"])
            for one in state["rollouts"]
        ]
        self.drawn = Drawn(state["step"], state["version"], rollouts)


def check_ahead(args: "OnPolicyConfig") -> None:
    """Raises `ConfigError` for what cannot be drawn ahead."""
    if args.rollouts_ahead not in (0, 1):
        raise ConfigError(f"rollouts_ahead must be 0 or 1, got {args.rollouts_ahead}", key="rollouts_ahead")
    if not args.rollouts_ahead:
        return
    if args.engine_options.backend in ("auto", "vllm", "transformers"):
        raise ConfigError(f"{ELSEWHERE}, not backend: {args.engine_options.backend}", key="rollouts_ahead")
    if args.rollout_correction == "none":
        raise ConfigError(
            "with rollouts_ahead the samples are of weights one rollout older than those that learn from them: set "
            "rollout_correction, such as token_truncate, which weighs them by the ratio",
            key="rollouts_ahead",
        )
    if args.dynamic_sampling_rounds:
        raise ConfigError(
            "dynamic_sampling_rounds draws again when the scores are known, and the engine draws the next rollout then "
            "(rollouts_ahead): set one of them to 0",
            key="rollouts_ahead",
        )
    if args.threshold_search is not None:
        raise ConfigError(
            "threshold_search puts earlier weights back, and what was drawn ahead would be of others: set "
            "rollouts_ahead: 0",
            key="rollouts_ahead",
        )
