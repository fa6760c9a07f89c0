"""The loss of a micro-batch of samples, token by token."""

from torch import Tensor

from align.objectives import kl
from align.objectives.policy_loss import (
    MAX_LOG_RATIO,
    PolicyLoss,
    RatioLevel,
    cispo_policy_loss,
    clipped_policy_loss,
    off_policy_kept,
    sapo_policy_loss,
    vespo_policy_loss,
)
from align.objectives.rollout_correction import Outside, importance_weights, log_ratios
from align.trainers.on_policy.config import OnPolicyConfig

# by the values of the options importance_sampling_level and rollout_correction
LEVELS: dict[str, RatioLevel] = {"token": "token", "sequence": "sequence_mean", "sequence_sum": "sequence"}
CORRECTIONS: dict[str, tuple[RatioLevel, Outside]] = {
    "token_truncate": ("token", "truncate"),
    "token_mask": ("token", "mask"),
    "sequence_truncate": ("sequence", "truncate"),
    "sequence_mask": ("sequence", "mask"),
}


def policy_objective(
    logps: Tensor, advantages: Tensor, batch: dict[str, Tensor], args: OnPolicyConfig, *, kl_coefficient: float
) -> tuple[Tensor, PolicyLoss]:
    """The surrogate with rollout correction and, with `kl_in: loss`, the KL: losses [B, L] and the surrogate.

    logps: of the policy that is trained, [B, L]. advantages: mixed, [B, L]. batch: of `collate`, with `ref_logps`, and
    with `old_logps` where several steps are made from a rollout. kl_coefficient: of the KL in the loss.
    """
    mask, old_logps = batch["completion_mask"], batch.get("old_logps", logps.detach())
    weights = None
    if args.rollout_correction != "none":
        level, outside = CORRECTIONS[args.rollout_correction]
        weights = importance_weights(
            log_ratios(old_logps, batch["engine_logps"], mask),
            mask,
            level=level,
            outside=outside,
            high=args.rollout_correction_high,
            low=args.rollout_correction_low,
        )
    policy = surrogate(logps, old_logps, advantages, mask, args, weights)
    policy.correction = weights
    losses = policy.losses
    if args.off_policy_mask_threshold is not None:
        drawn = old_logps if weights is None else batch["engine_logps"]
        losses = losses * off_policy_kept(advantages, logps, drawn, mask, args.off_policy_mask_threshold)
    if weights is not None and args.loss_type != "vespo":  # which has them in its ratio
        losses = losses * weights
    if args.kl_in == "loss" and kl_coefficient:
        penalty = getattr(kl, args.kl_estimator)(logps, batch["ref_logps"])
        if args.use_bias_correction_kl:
            penalty = penalty * (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        losses = losses + kl_coefficient * penalty
    return losses, policy


def surrogate(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    args: OnPolicyConfig,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate, or what `loss_type` names. weights: against the engine, or None. All tensors: [B, L]."""
    if args.loss_type == "sapo":
        above, below = args.sapo_temperature_pos, args.sapo_temperature_neg
        return sapo_policy_loss(logps, old_logps, advantages, mask, above=above, below=below)
    if args.loss_type == "vespo":
        return vespo_policy_loss(
            logps,
            old_logps,
            advantages,
            mask,
            above=(args.vespo_k_pos, args.vespo_lambda_pos),
            below=(args.vespo_k_neg, args.vespo_lambda_neg),
            correction=None if weights is None else weights.log(),
        )
    if args.loss_type == "cispo":
        assert args.epsilon_high is not None  # checked with the configuration
        return cispo_policy_loss(logps, old_logps, advantages, mask, high=args.epsilon_high)
    return clipped_policy_loss(
        logps,
        old_logps,
        advantages,
        mask,
        clip_low=args.epsilon,
        clip_high=args.epsilon_high or args.epsilon,
        dual_clip=args.dual_clip,
        ratio_level=LEVELS[args.importance_sampling_level],
    )


def loss_count(lengths: list[int], args: OnPolicyConfig) -> int:
    """What the loss of completions of these lengths is divided by: tokens, sequences, or their largest size."""
    counts = {"token_mean": sum(lengths), "constant": len(lengths) * args.max_completion_length}
    return counts.get(args.loss_aggregation, len(lengths))


def kept_lengths(mask: Tensor) -> list[int]:
    """Tokens of each completion of a micro-batch that is not left out. mask: [B, L]."""
    return [length for length in mask.sum(-1).int().tolist() if length]
