"""Which two of a prompt's completions become its pair: the estimator of methods that train on pairs of their own."""

from dataclasses import dataclass, replace

from torch import Tensor

from align.errors import ConfigError
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.estimators import Estimate, Estimator, register_estimator
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.samples import Sample
from align.trainers.on_policy.streams import Stream


@register_estimator("best_worst")
@dataclass
class BestWorst(Estimator):
    """The best and the worst of a prompt's completions by their scores. Of equal ones the first counts; a prompt whose
    completions all have one score has no pair, nor one of whose completions fewer than two count.

    The advantage of a completion is 1 if it is chosen, -1 if it is rejected, and 0 if it is in no pair.
    `pairs/without_signal` is the share of prompts without a pair, `pairs/score_gap` the difference of the two scores.
    """

    num_generations: int

    def __post_init__(self):
        if self.num_generations < 2:
            raise ConfigError(
                f"num_generations is {self.num_generations}: a pair is made of the prompt's own completions, so it "
                "takes at least 2",
                key="num_generations",
            )

    def estimate(self, stream: Stream, ranks: Ranks) -> Estimate:
        scores = stream.scores.view(-1, self.num_generations)
        kept = stream.mask.any(-1).view_as(scores)
        best = scores.masked_fill(~kept, -float("inf")).argmax(-1)
        worst = scores.masked_fill(~kept, float("inf")).argmin(-1)
        rows = range(len(scores))
        gaps = (scores[rows, best] - scores[rows, worst]).masked_fill(kept.sum(-1) < 2, 0.0)
        signs = scores.new_zeros(scores.shape)
        signs[rows, best] = 1.0
        signs[rows, worst] = -1.0
        signs[gaps == 0] = 0.0
        found = gaps[gaps > 0]
        metrics = {"pairs/without_signal": (gaps == 0).float().tolist(), "pairs/score_gap": found.tolist()}
        return Estimate(signs.view(-1, 1) * stream.mask, metrics=metrics)


def make_pairs(rollout: ScoredRollout) -> list[Sample]:
    """Two samples of each prompt, the chosen and the rejected one side by side, by the signs of their advantages; of a
    prompt without a pair any two, left out of the loss, so that all processes and mini-batches keep their sizes."""
    each = len(rollout.samples) // len(rollout.extra)
    pairs: list[Sample] = []
    for start in range(0, len(rollout.samples), each):
        group = rollout.samples[start : start + each]
        signs = [_sign(sample.advantages) for sample in group]
        if 1 in signs and -1 in signs:
            pairs += [group[signs.index(1)], group[signs.index(-1)]]
        else:
            pairs += [replace(sample, left_out=True) for sample in group[:2]]
    for sample in pairs:
        sample.advantages = None
    return pairs


def _sign(advantages: Tensor | None) -> int:
    assert advantages is not None  # the estimator has been asked
    return int(advantages[0].sign().sum())
