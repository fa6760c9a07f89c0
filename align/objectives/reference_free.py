"""Losses of pairs without a reference: CPO, SimPO, AlphaPO, ORPO. Conventions as in `align.objectives.dpo`.

a(y) = lp(y)/|y| is the mean log-prob per token, and NLL = -lp(y_w).
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.objectives.dpo import sft, smoothed
from align.objectives.f_divergences import alpha_divergence
from align.objectives.pair_logps import PairLogps


def cpo(pairs: PairLogps, *, beta: float = 0.1, cpo_alpha: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """cDPO's loss of beta (lp_w - lp_l), plus alpha times `sft`: CPO (Xu et al. 2024, arXiv 2401.08417).

    With alpha = 0 it is DPO against a uniform reference (`reference_free` in the DPO authors' repository).
    """
    preference = smoothed(beta * (pairs.chosen - pairs.rejected), label_smoothing)
    return preference if cpo_alpha == 0 else preference + cpo_alpha * sft(pairs)


def simpo(pairs: PairLogps, *, beta: float = 2.0, simpo_gamma: float = 1.0) -> Tensor:
    """-ls(beta (a_w - a_l) - gamma): SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6).

    gamma is the margin itself, not the authors' ratio gamma/beta (start at gamma = beta/2).
    """
    return -logsigmoid(beta * (mean_chosen(pairs) - mean_rejected(pairs)) - simpo_gamma)


def simpo_hinge(pairs: PairLogps, *, beta: float = 2.0, simpo_gamma: float = 1.0) -> Tensor:
    """max(0, 1 - (beta (a_w - a_l) - gamma)): the hinge variant in SimPO's repository."""
    return torch.relu(1 - beta * (mean_chosen(pairs) - mean_rejected(pairs)) + simpo_gamma)


def alphapo(pairs: PairLogps, *, beta: float = 25.0, simpo_gamma: float = 2.5, alphapo_alpha: float = 0.25) -> Tensor:
    """-ls(beta (r_w - r_l) - gamma) with r = (1 - e^(-alpha a))/alpha: AlphaPO (Gupta et al. 2025, arXiv 2501.03884).

    alpha -> 0 is SimPO.
    """
    chosen = alphapo_reward(mean_chosen(pairs), alphapo_alpha)
    rejected = alphapo_reward(mean_rejected(pairs), alphapo_alpha)
    return -logsigmoid(beta * (chosen - rejected) - simpo_gamma)


def alphapo_reward(mean_logps: Tensor, alpha: float) -> Tensor:
    """(1 - e^(-alpha a))/alpha, of any shape; a for alpha = 0. It is the score of an alpha-divergence, of a.

    A constant where the exponent is beyond `largest_exponent`: the gradient there is 0.
    """
    return alpha_divergence(mean_logps, alpha=1 - alpha)


def orpo(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """NLL/|y_w| - beta ls(log odds_w - log odds_l): ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7).

    beta is the paper's lambda, odds = p/(1-p) with p = e^a. NLL is the completion's alone; the authors' code and TRL's
    count the prompt's tokens too.
    """
    difference = log_odds(mean_chosen(pairs)) - log_odds(mean_rejected(pairs))
    return pairs.nll / pairs.chosen_length - beta * logsigmoid(difference)


def log_odds(logp: Tensor) -> Tensor:
    """log p - log(1-p) of log p < 0, of any shape. log p is capped just below 0, where the odds would be infinite."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - log1mexp(logp)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x < 0, of any shape, exact near 0 and far from it (Machler 2012, "Accurately computing
    log(1 - exp(-|a|))")."""
    near = x > -math.log(2)
    # each branch gets a harmless argument where the other one is taken: an inf would poison the gradient
    small, large = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def mean_rewards(pairs: PairLogps, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta a of chosen and rejected, [B] each: what SimPO and ORPO log as rewards."""
    return beta * mean_chosen(pairs), beta * mean_rejected(pairs)


def alphapo_rewards(pairs: PairLogps, *, beta: float, alphapo_alpha: float) -> tuple[Tensor, Tensor]:
    """beta r of chosen and rejected, [B] each."""
    chosen, rejected = (alphapo_reward(mean(pairs), alphapo_alpha) for mean in (mean_chosen, mean_rejected))
    return beta * chosen, beta * rejected


def mean_chosen(pairs: PairLogps) -> Tensor:
    """a(y_w), [B]."""
    return pairs.chosen / pairs.chosen_length


def mean_rejected(pairs: PairLogps) -> Tensor:
    """a(y_l), [B]."""
    return pairs.rejected / pairs.rejected_length
