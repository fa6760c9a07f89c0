"""The rollout engine of a trainer: made when it is first needed, and given the weights of every rollout."""

from collections.abc import Callable

from torch import nn

from align.distributed.shards import reshard
from align.errors import ConfigError, RolloutError
from align.rollout import choose_backend, make_engine
from align.rollout.engine import RolloutEngine
from align.rollout.probe import FAIL, WARN
from align.rollout.transformers_engine import NO_ZERO3
from align.rollout.types import OnDone, Rollout, SamplingParams
from align.trainers.core.recorder import Recorder


class SyncedEngine:
    """Holds an engine and knows which step's weights it has.

    Args:
        make: makes the engine from a model, with its weights.
        engine: one to use instead, and to leave open; its weights are pushed before they are used.
    """

    def __init__(
        self,
        make: Callable[[nn.Module], RolloutEngine],
        engine: RolloutEngine | None = None,
        *,
        recorder: Recorder,
    ):
        self.make, self.engine, self.owned = make, engine, engine is None
        self.recorder = recorder
        self.step: int | None = None  # whose weights the engine has, as far as is known

    @property
    def current(self) -> RolloutEngine:
        """The engine; RolloutError before the first `sync`."""
        if self.engine is None:
            raise RolloutError("there is no rollout engine yet: call sync(model, step) before anything is generated")
        return self.engine

    @property
    def name(self) -> str:
        return self.current.name

    def gap_limits(self, tolerance: float) -> tuple[float, float]:
        """Mean differences of log-probs (nats) between trainer and engine to warn and to stop at. tolerance: what is
        rounding whatever the model; on top of it, what rounding does to this model, as the engine's probe found."""
        rounding, own = self.current.rounding, self.current.sync_tolerance
        return max(tolerance, WARN * rounding), max(tolerance, FAIL * rounding) if own is None else own

    def sync(self, model: nn.Module, step: int) -> None:
        """Make the engine, if there is none yet, and give it the weights of this step. All processes must call it."""
        if self.engine is not None and self.step == step:
            return
        reshard(model)  # after an evaluation it has what is gathered rounded to the dtype that it computes in
        with self.recorder.phase("sync"):
            if self.engine is None:
                self.engine = self.make(model)
                self.engine.weight_version = step
            else:
                report = self.engine.push(model, step)
                if report.arrived_share is not None:
                    self.recorder.record("rollout/arrived_share", report.arrived_share)
        self.step = step

    def forget(self) -> None:
        """Push at the next `sync` whatever the step: the weights were changed by something else than a step."""
        self.step = None

    def rest(self) -> None:
        """Until the next `sync` the engine is not used: it may give its memory back."""
        if self.engine is not None and self.engine.sleep():
            self.step = None

    @property
    def tells(self) -> bool:
        """What the engine says, unless other functions stand in the place of its methods."""
        return self.current.tells and not {"generate", "_complete"} & vars(self.current).keys()

    @property
    def draws_elsewhere(self) -> bool:
        return self.current.draws_elsewhere

    def generate(
        self, prompts: list[list[int]], params: list[SamplingParams], on_done: OnDone | None = None
    ) -> list[Rollout]:
        if on_done is None:
            return self.current.generate(prompts, params)
        return self.current.generate(prompts, params, on_done=on_done)

    def anyone(self, wants: bool) -> bool:
        return self.current.anyone(wants)

    def close(self) -> None:
        """Free the engine, unless it was given. The next `sync` makes a new one."""
        if self.engine is not None and self.owned:
            self.engine.close()
            self.engine = self.step = None


def engine_maker(args, tokenizer, mixed_precision: str = "no", room: int = 0) -> Callable[[nn.Module], RolloutEngine]:
    """A function that makes the engine that a configuration (`OnPolicyConfig`) asks for.

    Unless it says otherwise, the engine computes in what the policy computes in: mixed precision, else its weights.
    room: tokens of the longest sequence besides prompts and completions (what a policy that judges itself reads).
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    options = args.engine_options.given()
    if is_deepspeed_zero3_enabled() and choose_backend(args.engine_options.backend) == "transformers":
        raise ConfigError(NO_ZERO3)  # before anything is trained; the engine is made when it is first needed
    if options.get("dtype") is None:
        options["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}.get(mixed_precision)

    def make(model: nn.Module) -> RolloutEngine:
        longest = max(room, args.max_prompt_length + args.max_completion_length)
        return make_engine(model, tokenizer, max_model_len=longest, seed=args.seed, **options)

    return make
