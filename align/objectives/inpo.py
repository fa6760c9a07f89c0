"""INPO: towards the Nash policy of a preference, by steps that stay near the reference and the policy before."""

from torch import Tensor

from align.objectives.shapes import check_same


def inpo_reference(ref_logps: Tensor, old_logps: Tensor, old_share: float) -> Tensor:
    """(tau/eta) lr + (1 - tau/eta) log pi_t, what IPO takes for the reference in INPO (Zhang et al. 2024, arXiv
    2407.00617); of any shape, token by token or summed.

    INPO's loss of a pair that pi_t wrote is (lp(y_w) - lp(y_l) - [the same difference of this] - 1/(2 eta))^2, which is
    `ipo_sum` with beta = eta. Over pairs drawn from pi_t it is smallest at
    pi ~ ref^(tau/eta) pi_t^(1 - tau/eta) exp(P(y > pi_t) / eta), the step of mirror descent; old_share: 1 - tau/eta.
    """
    check_same(ref_logps=ref_logps, old_logps=old_logps)
    return (1 - old_share) * ref_logps + old_share * old_logps
