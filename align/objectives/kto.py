"""KTO (Ethayarajh et al. 2024, arXiv 2402.01306): answers that are good or bad, each on its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from align.objectives.shapes import check_same

ADVISED = (1.0, 4 / 3)
"""What the paper advises for lambda_D n_D / (lambda_U n_U), the weights times the numbers of rows."""


@dataclass
class UnpairedLosses:
    """B answers; every tensor is [B].

    losses: with gradient; their mean is trained on. rewards: beta rho, for the log. logps: lp, for the log.
    labels: 1 where the answer is desirable, else 0. others: log pi(y'|x) - log ref(y'|x) of answers to other prompts,
    where they are part of the batch (evaluations).
    """

    losses: Tensor
    rewards: Tensor
    logps: Tensor
    labels: Tensor
    others: Tensor | None = None

    def values(self) -> dict[str, Tensor]:
        """All of it by name, without gradient; `loss` comes first."""
        others = {} if self.others is None else {"others": self.others.detach()}
        return {
            "loss": self.losses.detach(),
            "reward": self.rewards.detach(),
            "logps": self.logps.detach(),
            "label": self.labels,
            **others,
        }


def kto_losses(
    ratios: Tensor,
    labels: Tensor,
    reference_point: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """lambda_y - v(x, y): KTO (arXiv 2402.01306), [B]. TRL's `KTOTrainer` computes the same.

        lambda_D (1 - s(beta (rho - z0)))  of a desirable answer,
        lambda_U (1 - s(beta (z0 - rho)))  of an undesirable one,

    with s the sigmoid and rho = log pi(y|x) - log ref(y|x), summed over the answer's tokens.

    Args:
        ratios: rho, [B], in nats, with gradient.
        labels: [B], non-zero where the answer is desirable.
        reference_point: z0 of `reference_point`, in nats, a scalar without gradient; 0 makes the loss the unpaired
            APO-zero (arXiv 2408.06266).
        desirable_weight, undesirable_weight: lambda_D and lambda_U.
    """
    check_same(1, ratios=ratios, labels=labels)
    if isinstance(reference_point, Tensor):
        check_same(0, reference_point=reference_point)
    distance = beta * (ratios - reference_point)
    return torch.where(
        labels.bool(),
        desirable_weight * (1 - torch.sigmoid(distance)),
        undesirable_weight * (1 - torch.sigmoid(-distance)),
    )


def reference_point(mean_ratio: Tensor) -> Tensor:
    """z0 = max(0, mean over (x, y') of log pi(y'|x) - log ref(y'|x)), in nats, a scalar without gradient (arXiv
    2402.01306): a biased but cheap estimate of KL(pi || ref). The y' are answers to other prompts.

    mean_ratio: that mean, over all rows of an optimiser step.
    """
    return mean_ratio.detach().clamp(min=0)


def weight_advice(desirable: int, undesirable: int, desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to set where lambda_D n_D / (lambda_U n_U) is outside `ADVISED`; None where it is inside.

    desirable, undesirable: numbers of rows.
    """
    low, high = ADVISED
    if not desirable or not undesirable:
        which = "undesirable" if desirable else "desirable"
        pushed = "up" if desirable else "down"
        return f"no row is {which}: every answer is pushed {pushed}, and nothing holds against it"
    ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
    if low - 1e-6 <= ratio <= high + 1e-6:
        return None
    for_desirable = [bound * undesirable_weight * undesirable / desirable for bound in (low, high)]
    for_undesirable = [desirable_weight * desirable / (bound * undesirable) for bound in (high, low)]
    return (
        f"{desirable} desirable and {undesirable} undesirable rows: desirable_weight x {desirable} / "
        f"(undesirable_weight x {undesirable}) is {ratio:.3g}, and the paper advises 1 to 1.33: set desirable_weight "
        f"to {for_desirable[0]:.3g} ... {for_desirable[1]:.3g}, or undesirable_weight to {for_undesirable[0]:.3g} ... "
        f"{for_undesirable[1]:.3g}"
    )
