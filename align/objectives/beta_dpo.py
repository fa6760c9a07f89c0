"""beta-DPO (Wu et al. 2024, arXiv 2407.08639): DPO whose beta follows the batch, on the pairs that are not outliers.

With the gaps g_i = Delta_i of a batch, not multiplied by beta, running mean M and standard deviation S of the gaps
(updated with this batch first), ratio rho of pairs to drop and sensitivity a:

    q_i    = exp( -((g_i - M)/S)^2 / 2 )
    kept   = int(N (1 - rho)) pairs drawn without replacement, in proportion to q
    beta_b = max( beta (1 + a (mean of g over kept - M)), 1e-3 ), without gradient
    loss   = mean over kept of -ls(beta_b g_i)

The formulas are those of the authors' code (junkangwu/beta-DPO, 1629047). Evaluation neither filters nor moves the
running values: there the loss is DPO's at beta.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.objectives.pair_logps import PairLogps

PRESETS = ("corrected", "released")
SMALLEST_BETA = 1e-3


@dataclass(frozen=True)
class BetaDraw:
    """What one batch is trained with. beta: beta_b, a scalar. weights: [B], 0 for the pairs that were dropped, and the
    number of pairs over the number kept for the others, so that the mean over all pairs is the mean over the kept."""

    beta: Tensor
    weights: Tensor


def beta_dpo(pairs: PairLogps, *, beta: float = 0.1, draw: BetaDraw | None = None) -> Tensor:
    """-w_i ls(beta_b Delta_i), [B]; without a draw (evaluation) -ls(beta Delta_i). draw: of `BetaDPOState.step`."""
    if draw is None:
        return -logsigmoid(beta * pairs.delta)
    return -draw.weights.to(pairs.delta) * logsigmoid(draw.beta.to(pairs.delta) * pairs.delta)


class RunningMoments:
    """Exponential moving averages of the mean and the (unbiased) standard deviation of batches.

    m <- momentum * m + (1 - momentum) * batch, from 0. corrected: divided by 1 - momentum^t after t batches, so that
    after the first they are that batch's own; else the first steps are pulled to 0.
    """

    def __init__(self, momentum: float = 0.9, corrected: bool = True):
        self.momentum, self.corrected = momentum, corrected
        self.sums, self.steps = (0.0, 0.0), 0

    def update(self, values: Tensor) -> None:
        """values: [N]. One value has no standard deviation: it leaves everything as it is."""
        if len(values) < 2:
            return
        keep, (mean, std) = self.momentum, self.sums
        self.sums = (keep * mean + (1 - keep) * values.mean().item(), keep * std + (1 - keep) * values.std().item())
        self.steps += 1

    @property
    def mean(self) -> float:
        return self.sums[0] / self._scale

    @property
    def std(self) -> float:
        return self.sums[1] / self._scale

    @property
    def _scale(self) -> float:
        return 1 - self.momentum**self.steps if self.corrected and self.steps else 1.0


class BetaDPOState:
    """The running values of beta-DPO, and its random numbers. Saved and resumed with the run.

    Args:
        beta: DPO's.
        beta_dpo_alpha: a.
        beta_dpo_filter: rho, the share of the pairs that is dropped, in [0, 1).
        beta_dpo_momentum: of the running mean and standard deviation, in [0, 1).
        beta_dpo_preset: `corrected`, or `released` for what the authors' code does in training: running values that
            start at 0 without correction (on the first batch S is ten times too small, and most pairs have no weight),
            `torch.multinomial` on weights that underflow (it then returns pairs of weight 0), and a mean over the pairs
            kept on each process by itself.
        seed: of the drawing.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        beta_dpo_alpha: float = 0.6,
        beta_dpo_filter: float = 0.2,
        beta_dpo_momentum: float = 0.9,
        beta_dpo_preset: str = "corrected",
        seed: int = 0,
    ):
        self.beta, self.alpha, self.filter = beta, beta_dpo_alpha, beta_dpo_filter
        self.corrected = beta_dpo_preset == "corrected"
        self.moments = RunningMoments(beta_dpo_momentum, self.corrected)
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, gaps: Sequence[Tensor], rank: int = 0) -> BetaDraw:
        """Updates the running values with one batch, and draws from it.

        gaps: Delta of every process's pairs, [B_r] each, the same on all processes; rank: whose draw is returned.
        """
        sizes = [len(part) for part in gaps]
        everything = torch.cat([part.detach().double().cpu() for part in gaps])
        self.moments.update(everything)
        kept = self.draw(everything)
        beta = dynamic_beta(everything[kept].mean(), self.moments.mean, beta=self.beta, alpha=self.alpha)
        mine = kept.split(sizes)[rank]
        averaged = kept if self.corrected else mine
        return BetaDraw(beta, mine.double() * len(averaged) / averaged.sum().clamp(min=1))

    def draw(self, gaps: Tensor) -> Tensor:
        """Which of the gaps [N] are kept, bool [N]."""
        count = max(1, int(len(gaps) * (1 - self.filter) + 1e-9))  # 10 * (1 - 0.9) is 0.99...
        if count == len(gaps):
            return torch.ones(len(gaps), dtype=torch.bool)
        log_weights = log_sampling_weights(gaps, self.moments.mean, self.moments.std)
        if self.corrected:
            # Gumbel noise and the largest are the same draw, but from logarithms: nothing underflows
            uniform = torch.rand(len(gaps), generator=self.generator, dtype=torch.float64)
            chosen = (log_weights - torch.log(-torch.log(uniform))).topk(count).indices
        else:
            chosen = torch.multinomial(log_weights.exp(), count, replacement=False, generator=self.generator)
        return torch.zeros(len(gaps), dtype=torch.bool).index_fill(0, chosen, True)

    def state_dict(self) -> dict:
        moments = self.moments
        return {"sums": moments.sums, "steps": moments.steps, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.moments.sums, self.moments.steps = tuple(state["sums"]), state["steps"]
        self.generator.set_state(state["generator"])


def log_sampling_weights(gaps: Tensor, mean: float, std: float) -> Tensor:
    """log q_i = -((g_i - M)/S)^2 / 2, of any shape. With S = 0 (policy = reference: all gaps are 0) gaps at M get 0."""
    return -((gaps - mean) / max(std, torch.finfo(gaps.dtype).tiny)).square().clamp(max=1e300) / 2


def dynamic_beta(kept_mean: Tensor, mean: float, *, beta: float, alpha: float) -> Tensor:
    """beta_b = max( beta (1 + a (mean of g over kept - M)), 1e-3 ), a scalar. kept_mean: the mean of g over kept."""
    return (beta * (1 + alpha * (kept_mean - mean))).clamp(min=SMALLEST_BETA)
