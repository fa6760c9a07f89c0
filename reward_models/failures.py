"""What becomes of a completion whose reward failed: the run stops, it is left out, or it gets a stated score."""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from align.errors import ConfigError, RewardError
from align.reward_models.base import RewardBatch, RewardOutput

logger = logging.getLogger(__name__)

ON_ERROR = ("stop", "mask", "score")
SHARE = 0.1  # of completions that may fail
WINDOW = 1000  # completions over which the share is counted
LEAST = 100  # before there have been so many, the share is of this number
SHOWN = 3  # failures that are logged one by one


@dataclass(frozen=True)
class Failed:
    """In the place of a score: why there is none."""

    reason: str


class History:
    """Whether each of the last completions failed, and how many failures were logged one by one."""

    def __init__(self):
        self.recent: deque[bool] = deque(maxlen=WINDOW)
        self.shown = 0
        self.lock = threading.Lock()  # calls may run in threads


class Failures:
    """The rule of one reward, and the count of its failures.

    Args:
        reward: its name. on_error: stop (an error ends the run), mask (the completion is left out of the loss and of
            baselines) or score (it gets `error_score`).
        max_error_share: of the last 1,000 completions; more failures are an error whatever `on_error` says (0.1). In
            the first 100 completions the share of 100 may fail.
    """

    def __init__(
        self,
        reward: str,
        on_error: str = "stop",
        error_score: float | None = None,
        max_error_share: float | None = None,
    ):
        self.reward, self.on_error, self.error_score = reward, on_error, error_score
        if on_error not in ON_ERROR:
            raise ConfigError(f"reward {reward!r}: on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
        if (on_error == "score") != (error_score is not None):
            raise ConfigError(f"reward {reward!r}: on_error: score and error_score belong together, set both or none")
        if max_error_share is not None and (on_error == "stop" or not 0 < max_error_share <= 1):
            raise ConfigError(
                f"reward {reward!r}: max_error_share is above 0 and at most 1, for on_error: mask or score, got "
                f"{max_error_share!r} with {on_error}"
            )
        self.share = SHARE if max_error_share is None else max_error_share
        self.history = History()

    @property
    def stops(self) -> bool:
        return self.on_error == "stop"

    def count(self, outcomes: Sequence, indices: Sequence[int], batch: RewardBatch) -> None:
        """Of the completions at `indices`. Raises `RewardError` when there are too many failures."""
        seen = self.history
        with seen.lock:
            seen.recent.extend(isinstance(outcome, Failed) for outcome in outcomes)
            failed = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Failed)]
            for i in failed[: max(0, SHOWN - seen.shown)]:
                logger.warning("reward %r, %s: %s", self.reward, batch.row_name(indices[i]), outcomes[i].reason)
                seen.shown += 1
            allowed = self.share * max(len(seen.recent), LEAST)
            if failed and sum(seen.recent) > allowed:
                raise RewardError(
                    f"reward {self.reward!r} failed for {sum(seen.recent)} of the last {len(seen.recent)} completions, "
                    f"and max_error_share: {self.share:g} allows {allowed:g}. The last: "
                    f"{batch.row_name(indices[failed[-1]])}: {outcomes[failed[-1]].reason}"
                )

    def output(self, outcomes: Sequence[float | None | Failed]) -> RewardOutput:
        """Scores from what came back for each completion; None is a reward that does not apply to it."""
        failed = torch.tensor([isinstance(outcome, Failed) for outcome in outcomes], dtype=torch.bool)
        absent = torch.tensor([outcome is None for outcome in outcomes], dtype=torch.bool)
        instead = float("nan") if self.error_score is None else self.error_score
        numbers = [instead if isinstance(o, Failed) else float("nan") if o is None else o for o in outcomes]
        return RewardOutput(
            torch.tensor(numbers, dtype=torch.float32),
            {} if self.stops else {"failed": failed.float()},
            absent=absent if absent.any() else None,
            failed=failed if self.on_error == "mask" and failed.any() else None,
        )
