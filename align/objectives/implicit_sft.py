"""UFT's loss of supervised fine-tuning (Wang et al. 2024, arXiv 2410.21438): a demonstration is an answer whose reward
is known, and the policy's implicit reward is regressed to it."""

from torch import Tensor

from align.objectives.shapes import check_detached, check_same


def implicit_reward_loss(
    logps: Tensor, ref_logps: Tensor, scores: Tensor | float, *, beta: float
) -> tuple[Tensor, Tensor]:
    """The loss of each sequence (sigmoid(r_theta) - r)^2, and r_theta, the implicit reward; both [N].

    r_theta(x, y) = beta log(pi_theta(y|x) / pi_ref(y|x))    (eq. 5; the paper leaves beta log Z(x) out)
    loss(r, r_theta) = (sigmoid(r_theta(x, y)) - r)^2         (eq. 6 with the squared error; eq. 7 is r = 1)

    d loss / d log pi_theta(y|x) = 2 beta (sigma - r) sigma (1 - sigma), sigma = sigmoid(r_theta). It starts at
    (0.5 - r) beta / 2, for a demonstration minus 0.25 beta, and vanishes as sigma nears the score: that is what keeps
    the policy near its reference. The optimum of a score inside (0, 1) is r_theta = logit(r); a score of 1 has none:
    beta says how far the policy goes before little gradient is left. With beta near 0 sigma stays at 0.5, and this is
    plain fine-tuning on the summed log-probs, scaled by 0.25 beta.

    Args:
        logps, ref_logps: [N], in nats: log-probs of whole sequences, summed over their trained tokens, under the policy
            and under the reference (without gradient).
        scores: [N] or one number, the given rewards r in [0, 1]; 1 for demonstrations.
        beta: above 0; the paper has 0.01.
    """
    scored = scores if isinstance(scores, Tensor) else None
    check_same(1, logps=logps, ref_logps=ref_logps, scores=scored)
    check_detached(ref_logps=ref_logps)
    rewards = beta * (logps - ref_logps)
    return (rewards.sigmoid() - scores) ** 2, rewards
