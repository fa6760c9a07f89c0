"""How a weighting learns from the rollouts of an on-policy run."""

import logging

import torch

from align.errors import TrainingError
from align.trainers.core.ranks import Ranks
from align.trainers.core.recorder import Recorder
from align.trainers.on_policy.samples import Sample
from align.trainers.weighting.base import Weighting, rewards_named

logger = logging.getLogger(__name__)


REWARDED = -1e-3  # what the KL counts, from where on it is no rounding of 0


class WeightingUpdates:
    """Lets a weighting learn from the rewards of the global batch, and passes on what it has to say. kl: whether the
    policy pays for its KL to the reference."""

    def __init__(self, weighting: Weighting, ranks: Ranks, recorder: Recorder, *, kl: bool = False):
        self.weighting, self.ranks, self.recorder, self.kl = weighting, ranks, recorder, kl

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
        messages = self.weighting.messages + self._of_the_kl()
        for message in messages if self.ranks.index == 0 else ():
            logger.warning("step %d: %s", step, message)
        self.weighting.messages.clear()

    def learn_from_gradients(self, gradients: torch.Tensor) -> None:
        """gradients: as `Weighting.learn_from_gradients`."""
        self._log(self.weighting.learn_from_gradients(gradients))

    def _of_the_kl(self) -> list[str]:
        """A warning, once in a run, where the weights turn the price of the KL into a reward."""
        weight = self.weighting.kl_weight
        if not self.kl or weight >= REWARDED:
            return []
        self.kl = False
        return [
            f"the KL to the reference counts {weight:.3g} times beta: below 0 the policy is rewarded for going away. "
            "at_most constraints subtract their streams, with the KL that is in them by "
            "multipliers.kl_in_constraints or task_apart: leave these out, or hold the negative of the reward at_least"
        ]

    def _log(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.recorder.record(name, value)
