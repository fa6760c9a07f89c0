"""The coefficient of the KL to the reference: fixed, or moved towards a target."""

from torch import Tensor

from align.objectives.controllers import AdaptiveKL
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.samples import Sample, completion_masks, sequence_kl


class KLCoefficient:
    """`value` is the coefficient now. target: KL per sequence (nats) that it is adapted to, None to leave it at beta;
    horizon: episodes over which it adapts; gain: a constant share per rollout instead (`AdaptiveKL`)."""

    def __init__(self, beta: float, target: float | None = None, *, horizon: float = 10_000, gain: float | None = None):
        self.beta = beta
        self.controller = None if target is None else AdaptiveKL(beta, target, horizon, gain=gain)

    @property
    def adapts(self) -> bool:
        return self.controller is not None

    @property
    def value(self) -> float:
        return self.beta if self.controller is None else self.controller.value

    def update(self, kl: Tensor) -> None:
        """kl: of each sequence of the global rollout, [N] nats."""
        if self.controller is not None:
            self.controller.update(kl.mean().item(), len(kl))

    def follow(self, samples: list[Sample], ranks: Ranks) -> None:
        """Move by the KL of the rollout's samples on all processes, those that are left out aside."""
        sums = ranks.gather(sequence_kl(samples))[ranks.gather(completion_masks(samples).amax(-1)) > 0]
        if len(sums):
            self.update(sums)

    def state_dict(self) -> dict | None:
        return None if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, state: dict | None) -> None:
        if self.controller is not None and state is not None:
            self.controller.load_state_dict(state)
