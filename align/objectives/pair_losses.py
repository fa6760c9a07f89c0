"""What a loss on pairs returns: with the losses what it takes for the rewards of the two completions."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from align.errors import TrainingError


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


def check_losses(found: object, count: int, what: str) -> None:
    """TrainingError where the losses of `count` pairs that `what` returned, or their further numbers, would be
    broadcast, or have no gradient to train by."""
    losses = getattr(found, "losses", None)
    if losses is None:
        raise TrainingError(
            f"{what} must return align.objectives.pair_losses.PairLosses(losses, chosen_rewards, rejected_rewards), "
            f"got {type(found).__name__}"
        )
    check_rows(f"{what}, the losses", losses, count, "pair")
    if torch.is_grad_enabled() and not losses.requires_grad:
        raise TrainingError(f"{what}: the losses have no gradient; do not detach the policy's log-probs")
    if isinstance(found, PairLosses):
        rewards = {"chosen_rewards": found.chosen_rewards, "rejected_rewards": found.rejected_rewards}
        for name, values in (rewards | found.metrics).items():
            check_rows(f"{what}, {name}", values, count, "pair")


def check_rows(what: str, values: object, count: int, row: str = "row") -> None:
    """TrainingError unless `values`, which `what` returned, is a tensor [count]: any other would be broadcast against
    what has a number per row. row: what a row is, a pair say."""
    if not isinstance(values, Tensor):
        raise TrainingError(f"{what}: expected a tensor with one number per {row}, got {type(values).__name__}")
    if values.shape != (count,):
        mean = " (not a mean: that is taken over all of them)" if not values.dim() else ""
        raise TrainingError(
            f"{what}: expected one number per {row}, a tensor of shape [{count}]{mean}, got {list(values.shape)}"
        )
