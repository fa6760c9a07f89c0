"""SRPO (Choi et al. 2024, arXiv 2406.01660): a policy that answers, and improves answers, from preference pairs.

Two players share a reference. The generator pi(y|x) writes an answer; the improver pi+(y2|y1, x) writes a better one to
it, and one model can be both, the improver as the model that reads a prompt with y1 in it. With P(a>b) the probability
that a is preferred to b,

    min_pi max_pi+  E_{y1 ~ pi, y2 ~ pi+(.|y1)}[ P(y2>y1) ] - beta KL(pi+ || ref) + beta KL(pi || ref)

Its solution is pi+(a|b) = ref(a|b) exp(P(a>b) / beta) / Z(b) and pi(a) ~ ref(a) / Z(a). With the log-ratios
G(a|b) = log pi+(a|b) - log ref(a|b) and R(a) = log pi(a) - log ref(a), this is

    P(a>b) - 1/2   = beta (G(a|b) - G(b|b))
    2 P(a>b) - 1   = beta (G(a|b) - G(b|a) + R(a) - R(b))

which the two losses here regress on labels. The optimum depends on no distribution that the pairs are drawn from, and P
need not be transitive. The equations are derived from the game above; the paper's own constant for mixing the two
losses, its beta and its prompts are not known to us.
"""

from dataclasses import dataclass

from torch import Tensor

from align.objectives.pair_losses import PairLosses
from align.objectives.shapes import check_same


@dataclass
class RevisionRatios:
    """B pairs; every tensor is [B], in nats: log pi - log ref of a whole answer, with gradient.

    w is the chosen answer and l the rejected one. chosen, rejected: R(w), R(l), to the prompt alone. The others are G,
    of the first answer after the second: chosen_after_rejected is G(w|l), chosen_again is G(w|w).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_again: Tensor
    rejected_after_chosen: Tensor
    chosen_after_rejected: Tensor
    rejected_again: Tensor

    def __post_init__(self):
        check_same(1, **vars(self))

    @property
    def after_rejected(self) -> Tensor:
        """G(w|l) - G(l|l), [B]: at the optimum (P(w>l) - 1/2) / beta."""
        return self.chosen_after_rejected - self.rejected_again

    @property
    def after_chosen(self) -> Tensor:
        """G(l|w) - G(w|w), [B]: at the optimum (P(l>w) - 1/2) / beta."""
        return self.rejected_after_chosen - self.chosen_again


def improver_loss(ratios: RevisionRatios, *, beta: float = 0.1) -> Tensor:
    """1/2 [ (beta (G(w|l) - G(l|l)) - 1/2)^2 + (beta (G(l|w) - G(w|w)) + 1/2)^2 ], [B].

    Of a label that says w, 1/2 is P - 1/2 of w against l; its mean over labels is the optimum's.
    """
    return 0.5 * ((beta * ratios.after_rejected - 0.5) ** 2 + (beta * ratios.after_chosen + 0.5) ** 2)


def generator_loss(ratios: RevisionRatios, *, beta: float = 0.1) -> Tensor:
    """(beta (G(w|l) - G(l|w) + R(w) - R(l)) - 1)^2, [B]. Its gradient goes through the improver's G too."""
    improving = ratios.chosen_after_rejected - ratios.rejected_after_chosen
    return (beta * (improving + ratios.chosen - ratios.rejected) - 1) ** 2


def srpo_losses(ratios: RevisionRatios, *, beta: float = 0.1, improver_weight: float = 0.5) -> PairLosses:
    """(1 - c) L_generator + c L_improver, both with the same optimum for any c in (0, 1). improver_weight: c.

    At c = 1 nothing trains the generator, and at c = 0 only sums of G and R are determined. The rewards are beta R.
    """
    generator, improver = generator_loss(ratios, beta=beta), improver_loss(ratios, beta=beta)
    improved = ((ratios.after_rejected > 0).float() + (ratios.after_chosen < 0).float()) / 2
    return PairLosses(
        (1 - improver_weight) * generator + improver_weight * improver,
        beta * ratios.chosen,
        beta * ratios.rejected,
        {
            "generator/loss": generator,
            "improver/loss": improver,
            "improver/margins": beta * (ratios.after_rejected - ratios.after_chosen) / 2,
            "improver/accuracies": improved,
        },
    )
