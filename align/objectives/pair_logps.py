"""What a preference loss looks at: the log-probs of the two completions of each pair, under policy and reference.

Symbols of the docstrings in this package: y_w is the chosen completion and y_l the rejected one; lp(y) is
log pi(y|x) = sum_t log pi(y_t|x, y_<t) over the completion's tokens (EOS included), lr(y) the same of the reference;
rho(y) = lp(y) - lr(y); Delta = rho(y_w) - rho(y_l); |y| counts the completion's tokens. All logarithms are natural.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.errors import TrainingError
from align.objectives.shapes import check_detached, check_pairs, check_same


@dataclass
class PairLogps:
    """B pairs; every tensor is [B], in nats, summed over the tokens of the completion.

    chosen, rejected: lp(y_w), lp(y_l), with gradient.
    ref_chosen, ref_rejected: lr(y_w), lr(y_l), without; None where no reference is used.
    chosen_length, rejected_length: |y_w|, |y_l|, in tokens.
    chosen_kl, rejected_kl: sum_t KL(ref(.|x, y_<t) || pi(.|x, y_<t)) over the whole vocabulary, with gradient; only
        TDPO's losses look at it.
    chosen_nll: -lp(y_w) of all tokens with weight 1; None where that is -chosen (without `ld_alpha`).
    mean_chosen_length: mean |y_w| over all pairs of the optimiser step, a scalar; None takes the mean over these pairs.
    divergence: rho -> the score that replaces it (`align.objectives.f_divergences`); None is rho, the reverse KL.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_length: Tensor
    rejected_length: Tensor
    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None
    chosen_nll: Tensor | None = None
    mean_chosen_length: Tensor | None = None
    divergence: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self):
        check_same(1, **{k: v for k, v in vars(self).items() if k not in ("mean_chosen_length", "divergence")})
        check_detached(ref_chosen=self.ref_chosen, ref_rejected=self.ref_rejected)

    @property
    def chosen_ratio(self) -> Tensor:
        """rho(y_w), [B]."""
        return self.chosen - required(self.ref_chosen, "the reference's log-probs")

    @property
    def rejected_ratio(self) -> Tensor:
        """rho(y_l), [B]."""
        return self.rejected - required(self.ref_rejected, "the reference's log-probs")

    @property
    def chosen_score(self) -> Tensor:
        """rho(y_w), or what the f-divergence makes of it, [B]."""
        return self.chosen_ratio if self.divergence is None else self.divergence(self.chosen_ratio)

    @property
    def rejected_score(self) -> Tensor:
        """rho(y_l), or what the f-divergence makes of it, [B]."""
        return self.rejected_ratio if self.divergence is None else self.divergence(self.rejected_ratio)

    @property
    def delta(self) -> Tensor:
        """Delta, or the difference of the f-divergence's scores, [B]."""
        return self.chosen_score - self.rejected_score

    @property
    def nll(self) -> Tensor:
        """-lp(y_w), [B], untouched by `ld_alpha`."""
        return -self.chosen if self.chosen_nll is None else self.chosen_nll


def required(values: Tensor | None, what: str) -> Tensor:
    """`values`; TrainingError where they were not computed."""
    if values is None:
        raise TrainingError(
            f"this loss looks at {what}, which these pairs do not have: a loss states what it needs in its entry "
            "(needs_reference, needs_kl)"
        )
    return values


def pair_logps(
    logps: Tensor,
    mask: Tensor,
    ref_logps: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    ld_alpha: float | None = None,
) -> PairLogps:
    """Token log-probs of a batch of pairs -> the sums that losses look at.

    Args:
        logps, ref_logps: [2B, L], of policy and reference in nats; rows: B chosen, then B rejected in their order.
        mask: [2B, L], non-zero at completion tokens. Values outside do not enter.
        kl: [2B, L], KL(ref || pi) per token position.
        ld_alpha: weight in [0, 1] of the tokens beyond the length of the pair's shorter completion (LD-DPO,
            arXiv 2409.06411); None is 1. It weighs log-probs, not lengths and not the KL.
    """
    check_pairs(logps=logps, mask=mask, ref_logps=ref_logps, kl=kl)
    real = mask.bool()
    lengths = real.sum(-1)
    chosen_length, rejected_length = lengths.chunk(2)

    def sums(values: Tensor) -> Sequence[Tensor]:
        wide = torch.promote_types(values.dtype, torch.float32)  # a sum of -300 nats has steps of 2 in bfloat16
        return values.masked_fill(~real, 0).sum(-1, dtype=wide).chunk(2)

    chosen_nll = None
    if ld_alpha is not None:
        chosen_nll = -sums(logps)[0]
        weights = length_weights(mask, ld_alpha).to(logps.dtype)
        logps = logps * weights
        ref_logps = None if ref_logps is None else ref_logps * weights
    chosen, rejected = sums(logps)
    ref_chosen, ref_rejected = (None, None) if ref_logps is None else sums(ref_logps)
    chosen_kl, rejected_kl = (None, None) if kl is None else sums(kl)
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
        chosen_nll=chosen_nll,
    )


def length_weights(mask: Tensor, ld_alpha: float) -> Tensor:
    """Weights of the tokens [2B, L] that desensitise a pair to its lengths (LD-DPO, arXiv 2409.06411).

    1 on the first min(|y_w|, |y_l|) tokens of both completions, ld_alpha on those beyond; mask: [2B, L].
    """
    check_pairs(mask=mask)
    count = mask.bool().cumsum(-1)
    shared = torch.minimum(*count[:, -1].chunk(2)).repeat(2)
    beyond = count > shared[:, None]
    return torch.where(beyond, ld_alpha, 1.0)


def wpo_weights(logps: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """Weights of the pairs [B] by how likely the policy itself would have written them (WPO, arXiv 2406.11827, eq. 2).

    w(x, y) = exp( mean_t [ log pi(y_t|x, y_<t) - log sum_v pi(v|x, y_<t)^2 ] ), and a pair weighs w(y_w) w(y_l). No
    gradient flows through them.

    Args:
        logps, log_sum_sq_probs: [2B, L], the two logarithms above, in nats; rows: B chosen, then B rejected.
        mask: [2B, L], non-zero at completion tokens.
    """
    check_pairs(logps=logps, log_sum_sq_probs=log_sum_sq_probs, mask=mask)
    real = mask.bool()
    aligned = (logps - log_sum_sq_probs).detach().masked_fill(~real, 0)
    chosen, rejected = (aligned.sum(-1) / real.sum(-1)).chunk(2)
    return torch.exp(chosen + rejected)
