"""The loss of whole rankings: DPO under the Plackett-Luce model."""

import torch
from torch import Tensor

from align.objectives.pair_losses import PairLosses
from align.objectives.shapes import check_detached, check_same


def plackett_luce(rewards: Tensor, listed: Tensor) -> Tensor:
    """-log P(y_1 > y_2 > ... > y_K) of each list, [B], in nats.

        P(y_1 > ... > y_K) = prod_k exp(r_k) / sum_{j >= k} exp(r_j)

    with the implicit rewards r = beta (log pi - log ref): DPO's loss of rankings (Rafailov et al. 2023, arXiv
    2305.18290, appendix A.3; the model is Plackett's 1975 and Luce's 1959). Two answers give
    -log sigmoid(r_1 - r_2), the sigmoid loss. A number added to all rewards of a list changes nothing, so the gradients
    of a list sum to 0.

    rewards: [B, K], the best answer first. listed: [B, K], non-zero where the list has an answer, at its beginning;
    what stands behind is not looked at.
    """
    check_same(2, rewards=rewards, listed=listed)
    listed = listed.bool()
    rewards = rewards.masked_fill(~listed, 0.0)
    places = torch.arange(rewards.shape[1], device=rewards.device)
    itself = places[:, None] == places  # so that no row of the sums below is empty
    still_there = (places >= places[:, None]) & listed[:, None, :]
    rest = rewards[:, None, :].masked_fill(~(still_there | itself), -torch.inf).logsumexp(-1)
    return ((rest - rewards) * listed).sum(-1)


def listwise_losses(logps: Tensor, ref_logps: Tensor, listed: Tensor, *, beta: float) -> PairLosses:
    """`plackett_luce` of the implicit rewards, and what is logged of a list.

    logps, ref_logps: [B, K] of whole answers, nats, best first. The chosen reward is that of the best answer, the
    rejected one the mean of the others; the accuracy is the share of the list's pairs that the rewards order as it
    does.
    """
    check_same(2, logps=logps, ref_logps=ref_logps, listed=listed)
    check_detached(ref_logps=ref_logps)
    rewards = beta * (logps - ref_logps)
    kept, found = listed.bool(), rewards.detach()
    others = kept.clone()
    others[:, 0] = False

    def mean_of(values: Tensor, where: Tensor) -> Tensor:
        return values.masked_fill(~where, 0.0).sum(-1) / where.sum(-1)

    places = torch.arange(found.shape[1], device=found.device)
    pairs = (places[:, None] < places) & kept[:, :, None] & kept[:, None, :]
    ordered = (found[:, :, None] > found[:, None, :]) & pairs
    metrics = {
        "rewards/accuracies": ordered.sum((-2, -1)) / pairs.sum((-2, -1)),
        "logps/chosen": logps[:, 0],
        "logps/rejected": mean_of(logps.detach(), others),
    }
    return PairLosses(plackett_luce(rewards, kept), found[:, 0], mean_of(found, others), metrics)
