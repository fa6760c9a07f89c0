"""Losses of the DPO family against a reference: one function per loss, from the pairs' log-probs to a loss per pair.

Every function takes `PairLogps` and its options by keyword, and returns [B] in nats; the objective is their mean.
Symbols are explained in `align.objectives.pair_logps`; z = beta * Delta, ls = log sigmoid, s = sigmoid, and
e is `label_smoothing`. Where the docstring says Delta, an f-divergence may replace it.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.objectives.pair_logps import PairLogps, required


def sigmoid(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """-ls(z): DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""
    return -logsigmoid(beta * pairs.delta)


def cdpo(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """-(1-e) ls(z) - e ls(-z): labels are flipped with probability e (Mitchell 2023, "A note on DPO with noisy
    preferences"). Its minimum is at a finite z, unlike DPO's."""
    return smoothed(beta * pairs.delta, label_smoothing)


def smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    """-(1-e) ls(z) - e ls(-z), of any shape: cross-entropy against labels that are right with probability 1-e."""
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def robust(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """[ -(1-e) ls(z) + e ls(-z) ] / (1-2e): rDPO (Chowdhury et al. 2024, arXiv 2403.00409).

    Its mean over labels flipped with probability e is DPO's on the clean ones. Not bounded below.
    """
    z = beta * pairs.delta
    flipped = label_smoothing * logsigmoid(-z) - (1 - label_smoothing) * logsigmoid(z)
    return flipped / (1 - 2 * label_smoothing)


def hinge(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 - z): SLiC's calibration loss on DPO's rewards (Zhao et al. 2023, arXiv 2305.10425)."""
    return torch.relu(1 - beta * pairs.delta)


def ipo(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """(rho_w/|y_w| - rho_l/|y_l| - 1/(2 beta))^2: IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17) on means per token.

    beta is the paper's tau. TRL computes this form, which it says the authors confirmed; `ipo_sum` is without lengths.
    """
    return (length_normalised_delta(pairs) - 1 / (2 * beta)).square()


def ipo_sum(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """(Delta - 1/(2 beta))^2: IPO (arXiv 2310.12036, eq. 17) on sums, as in the DPO authors' repository."""
    return (pairs.delta - 1 / (2 * beta)).square()


def sigmoid_norm(pairs: PairLogps, *, beta: float = 5.0) -> Tensor:
    """-ls(beta (rho_w/|y_w| - rho_l/|y_l|)): length-normalised DPO (arXiv 2407.15229).

    A mean per token is far smaller than a sum: beta must be larger than DPO's by about the length.
    """
    return -logsigmoid(beta * length_normalised_delta(pairs))


def length_normalised_delta(pairs: PairLogps) -> Tensor:
    """rho_w/|y_w| - rho_l/|y_l|, [B]."""
    return pairs.chosen_score / pairs.chosen_length - pairs.rejected_score / pairs.rejected_length


def exo_pair(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """KL( (s(z), s(-z)) || (1-e, e) ), reverse: EXO (Ji et al. 2024, arXiv 2402.00856, eq. 16). e > 0."""
    z = beta * pairs.delta
    right = z.sigmoid() * (logsigmoid(z) - math.log1p(-label_smoothing))
    wrong = (-z).sigmoid() * (logsigmoid(-z) - math.log(label_smoothing))
    return right + wrong


def nca_pair(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """-ls(beta rho_w) - ls(-beta rho_w)/2 - ls(-beta rho_l)/2: NCA (Chen et al. 2024, arXiv 2402.05369)."""
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - logsigmoid(-chosen) / 2 - logsigmoid(-rejected) / 2


def bco_pair(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """-ls(beta rho_w) - ls(-beta rho_l): BCO (Jung et al. 2024, arXiv 2404.04656) without the reward shift, as TRL."""
    return -logsigmoid(beta * pairs.chosen_ratio) - logsigmoid(-beta * pairs.rejected_ratio)


def sppo_hard(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """(rho_w - 1/(2 beta))^2 + (rho_l + 1/(2 beta))^2: SPPO (Wu et al. 2024, arXiv 2405.00675, eq. 4.7) with hard
    labels: the chosen one wins with probability 1."""
    return (pairs.chosen_ratio - 1 / (2 * beta)).square() + (pairs.rejected_ratio + 1 / (2 * beta)).square()


def aot(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """cDPO's loss of the sorted margins: AOT for paired data (Melnyk et al. 2024, arXiv 2406.05882).

    The margins lp_w - lp_l of the batch and those of the reference are sorted separately and matched by rank, so the
    entries of [B] no longer belong to a pair each. With one pair it is cDPO.
    """
    margins = (pairs.chosen - pairs.rejected).sort().values
    reference = "the reference's log-probs"
    ref_margins = (required(pairs.ref_chosen, reference) - required(pairs.ref_rejected, reference)).sort().values
    return smoothed(beta * (margins - ref_margins), label_smoothing)


def aot_unpaired(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """cDPO's loss of sorted rho_w minus sorted rho_l: AOT for unpaired data (Melnyk et al. 2024, arXiv 2406.05882)."""
    chosen, rejected = pairs.chosen_ratio.sort().values, pairs.rejected_ratio.sort().values
    return smoothed(beta * (chosen - rejected), label_smoothing)


def apo_zero(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """1 - s(beta rho_w) + s(beta rho_l): APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7).

    For chosen completions that are better than the model's own.
    """
    return (-beta * pairs.chosen_ratio).sigmoid() + (beta * pairs.rejected_ratio).sigmoid()


def apo_down(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """s(beta rho_w) + 1 - s(z): APO-down (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8).

    For chosen completions that are worse than the model's own.
    """
    chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def discopop(pairs: PairLogps, *, beta: float = 0.1, discopop_tau: float = 0.05) -> Tensor:
    """-(1-m) ls(z) + m exp(-z) with m = s(z/tau): DiscoPOP (Lu et al. 2024, arXiv 2406.08414, eq. 5)."""
    z = beta * pairs.delta
    # m exp(-z) in one exponent: on its own exp(-z) is inf where m is 0
    exponential = torch.exp(logsigmoid(z / discopop_tau) - z)
    return exponential - (-z / discopop_tau).sigmoid() * logsigmoid(z)


def sft(pairs: PairLogps) -> Tensor:
    """-lp(y_w) / (mean |y_w|): its mean over pairs is the negative log-likelihood per token of the chosen completions.

    `PairLogps.mean_chosen_length` says over which pairs the mean length is taken.
    """
    mean_length = pairs.mean_chosen_length
    return pairs.nll / (pairs.chosen_length.to(pairs.nll.dtype).mean() if mean_length is None else mean_length)


def rpo_sum(pairs: PairLogps, *, beta: float = 0.01, rpo_eta: float = 0.005) -> Tensor:
    """-ls(z) - eta beta lp(y_w): RPO (Liu et al. 2024, arXiv 2405.16436) with the sum over tokens.

    As in the authors' alignment-handbook branch (eta 0.005, beta 0.01).
    """
    return sigmoid(pairs, beta=beta) + rpo_eta * beta * pairs.nll


def rpo_mean(pairs: PairLogps, *, beta: float = 0.5, rpo_coef: float = 0.2) -> Tensor:
    """-ls(z) - c lp(y_w)/|y_w|: RPO (arXiv 2405.16436) with the mean over tokens, without beta.

    As in the authors' OpenRLHF branch (c 0.2, beta 0.5). With c = 1 this is IRPO (Pang et al. 2024, arXiv 2404.19733).
    """
    return sigmoid(pairs, beta=beta) + rpo_coef * pairs.nll / pairs.chosen_length
