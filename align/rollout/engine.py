"""The one door to completions: trainers, best-of-n and evaluation all ask a `RolloutEngine`."""

import logging
from abc import ABC, abstractmethod

from align.errors import ConfigError
from align.rollout.types import PushReport, Rollout, SamplingParams

logger = logging.getLogger(__name__)


class RolloutEngine(ABC):
    """Token ids in, token ids with log-probs out.

    `weight_version` counts the pushes: 0 for the weights that the engine started with, then the version given to
    `push`. Every `Rollout` carries it.
    """

    name: str
    weight_version: int = 0

    @abstractmethod
    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Rollout]:
        """Complete `prompts` (lists of token ids), in order; `params` is one for all or one per prompt.

        The caller's random states (torch, numpy, python) are left as they were. Unseeded requests draw from the
        engine's own generator, which `state_dict` and `load_state_dict` save and restore.
        """

    @abstractmethod
    def push(self, model, version: int) -> PushReport:
        """Give the engine the weights of `model` (a transformers model, or a PEFT model) and prove that it has them.

        Raises `RolloutError` when the log-probs of a probe differ from the trainer's by more than the tolerance.
        """

    @abstractmethod
    def state_dict(self) -> dict:
        """What a resumed run needs to draw the same completions."""

    @abstractmethod
    def load_state_dict(self, state: dict) -> None: ...

    def close(self) -> None:
        """Free what the engine holds."""
