"""What an on-policy run logs, and the checks of its log-probs."""

from torch import Tensor

from align.errors import TrainingError
from align.objectives import kl
from align.objectives.policy_loss import PolicyLoss
from align.objectives.rollout_correction import log_ratios, mismatch
from align.trainers.on_policy.batches import padding_share
from align.trainers.on_policy.rollouts import Sample


class OnPolicyMetrics:
    """Of an on-policy trainer."""

    def check_logps(self, logps: Tensor, batch: dict[str, Tensor]) -> None:
        """The policy that is trained must be the one that sampled, and at step 0 also the reference."""
        mask, tolerance = batch["completion_mask"], self.logp_tolerance
        gap = ((logps - batch["engine_logps"]) * mask).abs().sum() / mask.sum()
        self.record("rollout/mean_abs_logp_diff", gap, mask.sum())
        if not gap <= tolerance:
            raise TrainingError(
                f"step {self.state.global_step + 1}: the log-probs of the rollouts differ by {gap:.4f} nats per token "
                f"between the {self.engine.name} engine and the trainer (allowed {tolerance}). Does something change "
                "the weights or the logits outside the trainer? Compare with rollout_backend: transformers"
            )
        for name, value in mismatch(log_ratios(logps, batch["engine_logps"], mask), mask).items():
            if name in ("kl_k3", "effective_sample_size"):
                self.record(f"rollout/{name}", value, mask.sum())
        if self.state.global_step == 0 and self.check_start:
            self.check_same_start(logps, batch["ref_logps"], mask)

    def record_rollouts(self, samples: list[Sample]) -> None:
        for sample in samples:
            for name, value in {**sample.rewards, **sample.extras}.items():
                self.record(f"rewards/{name}", value)
            self.record("reward", sample.score)
            self.record("completions/mean_length", sample.length)
            self.record("completions/clipped_ratio", sample.truncated)
        if self.kl_controller is not None:
            self.record("beta", self.beta)

    def record_update(self, logps: Tensor, entropy: Tensor, policy: PolicyLoss, batch: dict[str, Tensor]) -> None:
        mask = batch["completion_mask"]
        tokens = mask.sum()
        for name, estimator in (("kl", kl.k1), ("kl_k3", kl.k3)):
            per_token = estimator(logps, batch["ref_logps"])
            self.record(name, kl.masked_sum(per_token, mask, dim=-1).mean(), len(mask))
            self.record(f"{name}_per_token", kl.masked_mean(per_token, mask), tokens)
        for name, values in (("entropy", entropy), ("logps/mean", logps)):
            self.record(name, (values * mask).sum() / tokens, tokens)
        self.record("padding", padding_share(batch), batch["input_ids"].numel())
        if self.args.steps_per_rollout > 1:
            self.record("clip_ratio", policy.clipped.sum() / tokens, tokens)
            self.record("policy/approx_kl", policy.approx_kl, tokens)
            self.record("policy/ratio", kl.masked_mean(policy.ratio, mask), tokens)
