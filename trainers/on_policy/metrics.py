"""What an on-policy run logs of its rollouts and updates, and the check of its log-probs."""

import logging

from torch import Tensor

from align.errors import TrainingError
from align.modeling.dropout import has_dropout
from align.modeling.types import Model
from align.objectives import kl
from align.objectives.policy_loss import PolicyLoss
from align.objectives.rollout_correction import log_ratios, mismatch
from align.rollout.types import Episode
from align.trainers.core.recorder import Recorder
from align.trainers.core.reference_checks import DROPOUT
from align.trainers.on_policy.batches import padding_share
from align.trainers.on_policy.samples import Sample
from align.trainers.on_policy.truncation import TruncationRule

logger = logging.getLogger(__name__)


class OnPolicyMetrics:
    """Records what they are of: the log shows means over samples, sequences or tokens."""

    def __init__(self, recorder: Recorder, policy: Model):
        self.dropout = has_dropout(policy)
        self.record, self.spread = recorder.record, recorder.record_spread
        self.warned = False  # of a gap between engine and trainer

    def rollout(self, samples: list[Sample], truncation: TruncationRule) -> None:
        for sample in samples:
            if sample.left_out and not sample.masked:
                for name, value in sample.extras.items():
                    if name.endswith("/failed"):
                        self.record(f"rewards/{name}", value)
                continue
            for name, value in {**sample.rewards, **sample.extras}.items():
                self.record(f"rewards/{name}", value)
            for name, value in sample.rewards.items():
                self.spread(f"rewards/{name}", value)
            self.record("reward", sample.score)
            self.record("completions/mean_length", sample.written)
            self.record("completions/clipped_ratio", sample.truncated)
            if truncation.truncated == "mask":
                self.record("completions/masked_ratio", sample.masked)
            if truncation.penalises:
                self.record("completions/penalty", sample.penalty)
            if sample.episode is not None:
                self.episode(sample.episode)

    def episode(self, episode: Episode) -> None:
        """The share of calls that failed is of all calls: TRL's `tools/failure_frequency`."""
        self.record("environment/turns", episode.turns)
        self.record("environment/finished_ratio", episode.finished)
        self.record("environment/tokens", len(episode.policy_mask) - sum(episode.policy_mask))
        self.record("tools/call_frequency", episode.calls)
        if episode.calls:
            self.record("tools/failure_frequency", episode.failed_calls / episode.calls, episode.calls)

    def all(self, metrics: dict[str, list[float]]) -> None:
        """Of an estimator."""
        for name, values in metrics.items():
            for value in values:
                self.record(name, value)

    def engine_agrees(
        self,
        logps: Tensor,
        batch: dict[str, Tensor],
        *,
        limits: tuple[float, float],
        step: int,
        engine: str,
        truncated: bool = False,
        judged: bool = True,
    ) -> None:
        """The policy that is trained must compute what sampled: warns, once, and raises `TrainingError` if the mean
        difference of their log-probs (nats) is above the first and the second of `limits`.

        truncated: the engine's are of a truncated distribution, and so above the trainer's by -log of the probability
        that was left: only what lies below them is a difference then. judged: False where they are to differ, as those
        of older weights do; then the differences are recorded, and that is all.
        """
        mask = batch["completion_mask"]
        gaps = (logps - batch["engine_logps"])[mask.bool()]
        gaps = gaps.clamp(min=0) if truncated else gaps.abs()
        gap, p99 = gaps.mean(), gaps.float().kthvalue(max(1, int(0.99 * len(gaps)))).values
        self.record("rollout/mean_abs_logp_diff", gap, mask.sum())
        self.record("rollout/p99_abs_logp_diff", p99, mask.sum())
        found = (
            f"step {step}: the log-probs of the rollouts differ by {gap:.4f} nats per token between the {engine} "
            f"engine and the trainer (99 % of them by less than {p99:.4f})"
        )
        if judged and not gap <= limits[1]:
            outside = "Does something change the weights or the logits outside the trainer?"
            outside += "" if engine == "transformers" else " Compare with rollout.backend: transformers"
            raise TrainingError(
                f"{found}, and {limits[1]:.4f} is allowed" + (f": {DROPOUT}" if self.dropout else f". {outside}")
            )
        if judged and gap > limits[0] and not self.warned:
            self.warned = True
            logger.warning("%s: more than rounding usually does. rollout_correction weighs such differences", found)
        for name, value in mismatch(log_ratios(logps, batch["engine_logps"], mask), mask).items():
            if name in ("kl_k3", "effective_sample_size"):
                self.record(f"rollout/{name}", value, mask.sum())

    def update(self, logps: Tensor, entropy: Tensor, batch: dict[str, Tensor]) -> None:
        mask = batch["completion_mask"]
        tokens, kept = mask.sum(), mask.any(-1)
        if not tokens:
            return
        for name, estimator in (("kl", kl.k1), ("kl_k3", kl.k3)) if "ref_logps" in batch else ():
            per_token = estimator(logps, batch["ref_logps"])
            self.record(name, kl.masked_sum(per_token, mask, dim=-1)[kept].mean(), kept.sum())
            self.record(f"{name}_per_token", kl.masked_mean(per_token, mask), tokens)
        for name, values in (("entropy", entropy), ("logps/mean", logps)):
            self.record(name, (values * mask).sum() / tokens, tokens)
        self.record("padding", padding_share(batch), batch["input_ids"].numel())

    def correction(self, weights: Tensor | None, mask: Tensor) -> None:
        """Of what `rollout_correction` makes of the loss: weights [B, L], 0 where it is dropped; None without."""
        tokens = mask.sum()
        if weights is not None and tokens:
            self.record("rollout/correction_weight", kl.masked_mean(weights, mask), tokens)
            self.record("rollout/correction_dropped", kl.masked_mean((weights == 0).float(), mask), tokens)

    def surrogate(self, policy: PolicyLoss, mask: Tensor) -> None:
        """Of the clipped loss, where several steps are made from a rollout."""
        tokens = mask.sum()
        if not tokens:
            return
        self.record("clip_ratio", policy.clipped.sum() / tokens, tokens)
        self.record("policy/approx_kl", policy.approx_kl, tokens)
        self.record("policy/ratio", kl.masked_mean(policy.ratio, mask), tokens)
