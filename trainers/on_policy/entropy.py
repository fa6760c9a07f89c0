"""The entropy of the policy's tokens as a part of the loss, and as a choice of the tokens that are trained on."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.samples import Sample, completion_masks, completion_matrix


class EntropyBonus(TrainerCallback):
    """-coefficient x the mean entropy of the tokens of an optimiser step, over all micro-batches and processes.

    With `use_adaptive_entropy` the coefficient moves at the end of every step by the entropy that the step had, and
    counts in the next one if that was at most the target (Skywork-OR1, arXiv 2505.22312, sec. 3.2.6).

    Args:
        args: `LossOptions`.
        record: of the metrics.
    """

    def __init__(self, args: Any, ranks: Ranks, record: Callable[..., None]):
        self.args, self.ranks, self.record = args, ranks, record
        self.on, self.adapts = args.has_entropy_bonus, args.use_adaptive_entropy
        self.coefficient = args.entropy_coef
        self.last = -math.inf  # the entropy of the step before
        self.count: Tensor | float = 1.0
        self.sums = torch.zeros(2)  # of the entropy, and of tokens

    def begin(self, samples: list[Sample]) -> None:
        """samples: of the optimiser step, on this process."""
        if self.on:
            tokens = sum(sample.written for sample in samples if not sample.left_out)
            self.count = self.ranks.total(tokens).clamp(min=1)

    def added_to(self, loss: Tensor, entropy: Tensor, mask: Tensor, count: int, of: Tensor | float) -> Tensor:
        """The loss of a micro-batch with its share of the bonus. count, of: what this loss would be divided by alone,
        and what it was divided by, the whole step's."""
        if count:  # the mean over the step's micro-batches is then the step's loss
            self.record("policy_loss", loss.detach() * of / count, count)
        return loss + self.term(entropy, mask)

    def term(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """What is added to the loss of a micro-batch, its share of the step's. entropy: with gradient, mask: [B, L]."""
        total = (entropy * mask).sum()
        self.sums = self.sums.to(total.device) + torch.stack([total.detach(), mask.sum()])
        applied = self.coefficient if not self.adapts or self.last <= self.args.entropy_target else 0.0
        return -applied * total / self.count

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record("entropy_coef", self.coefficient)
        if self.adapts:
            options = self.args
            total, tokens = self.ranks.sum(self.sums).tolist()
            self.last = total / max(tokens, 1.0)
            up = 1 if self.last <= options.entropy_target else -1
            moved = self.coefficient + up * options.entropy_coef_delta
            self.coefficient = min(max(moved, options.entropy_coef_min), options.entropy_coef_max)
        self.sums = torch.zeros_like(self.sums)

    def state_dict(self) -> dict[str, float] | None:
        return {"coefficient": self.coefficient, "last": self.last} if self.adapts else None

    def load_state_dict(self, state: dict[str, float] | None) -> None:
        if self.adapts and state is not None:
            self.coefficient, self.last = state["coefficient"], state["last"]


def train_high_entropy_tokens(samples: list[Sample], share: float, ranks: Ranks) -> None:
    """Take the advantages off all but the `share` of a rollout's tokens that have the highest entropy, over all
    processes (Wang et al. 2025, arXiv 2506.01939, eq. 4). The samples' `entropies` are used up."""
    entropies, mask = ranks.gather(completion_matrix(samples, "entropies")), ranks.gather(completion_masks(samples))
    every = entropies[mask > 0]
    if len(every):
        kept = max(1, math.ceil(share * len(every)))  # of few tokens at least one is trained
        least = every.kthvalue(len(every) - kept + 1).values
    for sample in samples:
        own, sample.entropies = sample.entropies, None
        if len(every) and own is not None and sample.advantages is not None:
            sample.advantages = sample.advantages * (own >= least)[:, None]
