"""What a loss on pairs returns: with the losses what it takes for the rewards of the two completions."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class RowLosses(Protocol):
    """What a loop over rows needs of their losses.

    losses: [B], with gradient. values(): a number per row [B] by the names of the log, without gradient; `loss` first.
    """

    losses: Tensor

    def values(self) -> dict[str, Tensor]: ...


@dataclass
class PairLosses:
    """B pairs; every tensor is [B].

    losses: with gradient; their mean is trained on.
    chosen_rewards, rejected_rewards: the rewards that the loss compares, for the log.
    metrics: further numbers for the log, by name. One with a name of `values` takes its place.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """Of chosen and rejected."""
        return self.chosen_rewards, self.rejected_rewards

    def values(self) -> dict[str, Tensor]:
        """All of it by the names of the log, without gradient; `loss` comes first."""
        chosen, rejected = (rewards.detach() for rewards in self.rewards)
        return {
            "loss": self.losses.detach(),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": chosen > rejected,
            **{name: values.detach() for name, values in self.metrics.items()},
        }
