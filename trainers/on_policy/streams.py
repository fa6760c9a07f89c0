"""Streams of scores, and their advantages: the input of an estimator, and what is done with its output."""

from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor

from align.errors import RewardError, TrainingError
from align.objectives.policy_loss import PolicyLoss
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.samples import Sample, completion_masks, completion_matrix, sampling_logps, scatter
from align.trainers.weighting.base import Weighting, rewards_named

EPSILON = 1e-4  # TRL's, added to a deviation


@dataclass
class Stream:
    """One column of scores and what its advantages are estimated from. P prompts, N samples (a prompt's side by side),
    L tokens.

    scores: [N]. extra_scores: [P, E], of the completions of each prompt that are not trained on (ReMax's greedy one),
    None without. beta: coefficient of the KL inside this stream's reward. logps: of the policy that sampled; ref_logps,
    mask: [N, L]. Where no KL is trained on, ref_logps are logps. A sample that is left out has a mask of zeros, and
    its score is to be in no baseline (`kept`). values: [N, L], of a critic, or None; last_values: [N], of the state
    after the last token, 0 of completions that have ended; None where all count as ended.
    """

    name: str
    scores: Tensor
    extra_scores: Tensor | None
    beta: float
    logps: Tensor
    ref_logps: Tensor
    mask: Tensor
    values: Tensor | None = None
    last_values: Tensor | None = None

    @property
    def kept(self) -> Tensor | None:
        """Which samples count, [N] bool; None if all of them do."""
        kept = self.mask.any(-1)
        return None if kept.all() else kept


def make_streams(rollout: ScoredRollout, weighting: Weighting, beta: float) -> list[Stream]:
    """The streams of a weighting. beta: coefficient of the KL that is a part of the reward, 0 if it is not."""
    samples = rollout.samples
    own = [stream_scores(sample, weighting) for sample in samples]
    extra = [[stream_scores(sample, weighting) for sample in group] for group in rollout.extra]
    values = completion_matrix(samples, "values") if samples[0].values is not None else None
    last = last_values(samples)
    logps = sampling_logps(samples)
    shared = {
        "logps": logps,
        "ref_logps": logps if samples[0].ref_logps is None else completion_matrix(samples, "ref_logps"),
        "mask": completion_masks(samples),
    }
    return [
        Stream(
            name=stream.name,
            scores=torch.tensor([scores[stream.name] for scores in own]),
            extra_scores=torch.tensor([[s[stream.name] for s in group] for group in extra]) if extra[0] else None,
            beta=beta * stream.kl,
            values=None if values is None else values[..., i],
            last_values=None if last is None else last[:, i],
            **shared,
        )
        for i, stream in enumerate(weighting.streams)
    ]


def last_values(samples: list[Sample]) -> Tensor | None:
    """Values after the last tokens, [N, S]; None where no completion is bootstrapped from one."""
    found = [sample.bootstrap for sample in samples if sample.bootstrap is not None]
    if not found:
        return None
    return torch.stack([torch.zeros_like(found[0]) if s.bootstrap is None else s.bootstrap for s in samples])


def stream_scores(sample: Sample, weighting: Weighting) -> dict[str, float]:
    """One sample's score in every stream; 0 if it is left out. Raises `RewardError` for a weighting that needs a score
    of every reward.

    Its penalty is taken off the streams that have a share of it (`StreamSpec.penalty`); where a value stands for what
    follows a cut completion, the penalty is all there is of its score.
    """
    if sample.left_out:
        return {stream.name: 0.0 for stream in weighting.streams}
    absent = [name for name in weighting.reward_weights if name not in sample.rewards]
    if absent and weighting.needs_all:
        raise RewardError(
            f"reward {', '.join(absent)} does not apply (None) to a completion of row {sample.prompt.get('row')} of "
            "the dataset, and constraints, weights that change and normalize_then_sum need a score of every reward for "
            "every completion: "
            "return a number, or use fixed reward_weights"
        )
    with rewards_named(weighting):
        scores = weighting.scores(sample.rewards)
    missing = [stream.name for stream in weighting.streams if not isfinite(scores.get(stream.name, nan))]
    if missing:
        raise TrainingError(
            f"weighting {type(weighting).__name__}: scores gives no finite number for {', '.join(missing)}: {scores} "
            f"of the rewards {sample.rewards}"
        )
    if sample.bootstrap is not None:
        scores = dict.fromkeys(scores, 0.0)
    if sample.penalty:
        scores = {stream.name: scores[stream.name] - stream.penalty * sample.penalty for stream in weighting.streams}
    return scores


def fill_advantages(rollout: ScoredRollout, estimator, weighting: Weighting, ranks: Ranks, beta: float) -> dict:
    """Give every sample its advantages, and the returns that a critic learns; returns the metrics, by name."""
    streams = make_streams(rollout, weighting, beta)
    advantages, returns, metrics = estimate_advantages(streams, estimator, weighting, ranks)
    scatter(rollout.samples, "advantages", advantages)
    if returns is not None:
        scatter(rollout.samples, "returns", returns)
    return {**estimator.metrics(rollout), **metrics}


def estimate_advantages(
    streams: list[Stream], estimator, weighting: Weighting, ranks: Ranks
) -> tuple[Tensor, Tensor | None, dict]:
    """Advantages of every stream, [N, L, S], their returns likewise (None without a critic), and metrics."""
    found = [checked(estimator.estimate(stream, ranks), stream, estimator) for stream in streams]
    advantages = [one.advantages for one in found]
    if weighting.standardize:
        advantages = [ranks.whiten(a, stream.mask) for a, stream in zip(advantages, streams, strict=True)]
    if weighting.scaled:
        advantages = scaled(advantages, weighting, streams[0].mask, ranks)
    returns = None if found[0].returns is None else torch.stack([one.returns for one in found], dim=-1)
    metrics = {name: values for one in found for name, values in one.metrics.items()}
    return torch.stack(advantages, dim=-1), returns, metrics


def checked(estimate: Any, stream: Stream, estimator: Any) -> Any:
    """The `Estimate`; TrainingError for one that would be broadcast to tokens that it is not of, or is not finite."""
    here, shape = f"estimator {type(estimator).__name__}, stream {stream.name!r}", stream.mask.shape
    if not hasattr(estimate, "advantages"):
        raise TrainingError(f"{here}: estimate must return an Estimate, got {type(estimate).__name__}")
    for name, metric in estimate.metrics.items():
        if not isinstance(metric, list | tuple) and getattr(metric, "ndim", 0) != 1:
            raise TrainingError(f"{here}: metrics must be lists of numbers, and {name} is {type(metric).__name__}")
    for name in ("advantages", "returns"):
        values = getattr(estimate, name)
        if values is None and name == "returns":
            continue
        if not isinstance(values, Tensor) or values.shape != shape:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise TrainingError(
                f"{here}: {name} must be a tensor [samples, tokens], here {list(shape)}, got {got}; a number per "
                "sample a is a[:, None] * stream.mask"
            )
        wrong = (~values.isfinite() & stream.mask.bool()).any(-1).nonzero().flatten().tolist()
        if wrong:
            raise TrainingError(f"{here}: {name} are not finite for samples {wrong[:10]}; look at what divides by 0")
    return estimate


def scaled(advantages: list[Tensor], weighting: Weighting, mask: Tensor, ranks: Ranks) -> list[Tensor]:
    """Every stream's advantages [N, L] over the deviation of their weighted sum, over the samples of all processes that
    count (GDPO, eq. 7). The sum's mean is 0 already, as every group's is."""
    total = ranks.gather(mix(torch.stack(advantages, dim=-1), weighting)[:, 0])
    total = total[ranks.gather(mask.amax(-1)) > 0]
    deviation = total.std() if len(total) > 1 else torch.tensor(0.0)
    return [stream / (deviation + EPSILON) for stream in advantages]


def mix(advantages: Tensor, weighting: Weighting) -> Tensor:
    """The advantages that the policy is trained on: each stream's times its weight now. [B, L, S] -> [B, L]."""
    weights, streams = weighting.weights(), advantages.shape[-1]
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != streams or not all(map(isfinite, numbers)):
        raise TrainingError(
            f"weighting {type(weighting).__name__}: weights must give {streams} finite numbers, one per stream, got "
            f"{weights}"
        )
    return advantages @ torch.tensor(numbers).to(advantages)


def checked_losses(returned: Any, trainer: Any) -> Any:
    """What `token_losses` of a trainer returns: the losses, whose shape is looked at where they are summed, and a
    `PolicyLoss`."""
    here = f"{type(trainer).__name__}.token_losses"
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], Tensor):
        raise TrainingError(f"{here} must return the losses of the tokens and a PolicyLoss, for the log")
    if torch.is_grad_enabled() and not returned[0].requires_grad:
        raise TrainingError(f"{here}: the losses have no gradient: logps were detached")
    if not isinstance(returned[1], PolicyLoss):
        raise TrainingError(f"{here} must return a PolicyLoss beside the losses, got {type(returned[1]).__name__}")
    return returned
