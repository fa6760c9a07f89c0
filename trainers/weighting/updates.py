"""How a weighting learns from the rollouts of an on-policy run."""

import logging

import torch

from align.errors import TrainingError
from align.trainers.core.ranks import Ranks
from align.trainers.core.recorder import Recorder
from align.trainers.on_policy.samples import Sample
from align.trainers.weighting.base import Weighting, rewards_named

logger = logging.getLogger(__name__)


class WeightingUpdates:
    """Lets a weighting learn from the rewards of the global batch, and passes on what it has to say."""

    def __init__(self, weighting: Weighting, ranks: Ranks, recorder: Recorder):
        self.weighting, self.ranks, self.recorder = weighting, ranks, recorder

    def learn(self, samples: list[Sample], step: int) -> None:
        """samples: of this process. step: the one that is being made, for messages."""
        names = list(self.weighting.reward_weights)
        none = float("nan")
        rows = self.ranks.gather(
            torch.tensor([[*(s.rewards.get(name, none) for name in names), s.written, s.left_out] for s in samples])
        )
        rows = rows[rows[:, -1] == 0][:, :-1]
        if not len(rows):
            return
        columns = dict(zip(names, rows[:, :-1].unbind(1), strict=True))
        with rewards_named(self.weighting):
            metrics = self.weighting.update(columns, rows[:, -1])
        if not isinstance(metrics, dict):
            who = type(self.weighting).__name__
            raise TrainingError(f"weighting {who}: update must return metrics by name, got {type(metrics).__name__}")
        self._log(metrics)
        for message in self.weighting.messages if self.ranks.index == 0 else ():
            logger.warning("step %d: %s", step, message)
        self.weighting.messages.clear()

    def learn_from_gradients(self, gradients: torch.Tensor) -> None:
        """gradients: as `Weighting.learn_from_gradients`."""
        self._log(self.weighting.learn_from_gradients(gradients))

    def _log(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.recorder.record(name, value)
