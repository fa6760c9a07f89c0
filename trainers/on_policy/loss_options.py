"""Options of the policy's loss beyond the clipped surrogate, by TRL's names."""

from dataclasses import dataclass, field, fields
from typing import Any

from align.errors import ConfigError
from align.trainers.core.trl_options import TrlDefaults

ADAPTIVE = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")


@dataclass
class LossOptions(TrlDefaults):
    """Mixed into the configuration of on-policy methods."""

    delta: float | None = field(default=None, metadata={"help": "TRL's name of dual_clip."})
    off_policy_mask_threshold: float | None = field(
        default=None,
        metadata={
            "help": "DeepSeek-V3.2's sequence mask: no loss of tokens with negative advantage in completions that the "
            "policy would now write by more than so many nats per token less likely than when they were drawn."
        },
    )
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={
            "help": "With kl_in: loss, multiply the KL by the probability ratio, whose gradient makes that of k3 the "
            "reverse KL's (DeepSeek-V3.2)."
        },
    )
    top_entropy_quantile: float = field(
        default=1.0,
        metadata={
            "help": "Train on this share of the rollout's tokens, those of the highest entropy (arXiv 2506.01939; 0.2 "
            "there); 1: on all. A KL in the loss stays on all."
        },
    )
    entropy_coef: float = field(
        default=0.0,
        metadata={"help": "The mean entropy of the policy's tokens, times this, is subtracted from the loss."},
    )
    use_adaptive_entropy: bool = field(
        default=False,
        metadata={
            "help": "Move entropy_coef after every step (Skywork-OR1, arXiv 2505.22312): up by entropy_coef_delta "
            "where the entropy is at most entropy_target, else down; it counts only in the first case."
        },
    )
    entropy_coef_min: float = field(default=0.0, metadata={"help": "With use_adaptive_entropy: smallest entropy_coef."})
    entropy_coef_max: float = field(default=1.0, metadata={"help": "With use_adaptive_entropy: largest entropy_coef."})
    entropy_coef_delta: float = field(default=0.005, metadata={"help": "With use_adaptive_entropy: its step."})
    entropy_target: float = field(
        default=0.2, metadata={"help": "With use_adaptive_entropy: mean entropy of a token, nats."}
    )
    sapo_temperature_pos: float = field(
        default=1.0, metadata={"help": "With loss_type: sapo, of tokens with an advantage above 0."}
    )
    sapo_temperature_neg: float = field(default=1.05, metadata={"help": "With loss_type: sapo, of the other tokens."})
    vespo_k_pos: float = field(
        default=2.0,
        metadata={"help": "With loss_type: vespo, the power of the ratio where the advantage is at least 0."},
    )
    vespo_lambda_pos: float = field(default=3.0, metadata={"help": "With loss_type: vespo, the decay there."})
    vespo_k_neg: float = field(default=3.0, metadata={"help": "With loss_type: vespo, the power where it is below 0."})
    vespo_lambda_neg: float = field(default=2.0, metadata={"help": "With loss_type: vespo, the decay there."})

    @property
    def has_entropy_bonus(self) -> bool:
        return bool(self.entropy_coef) or self.use_adaptive_entropy


def take_delta(args: Any) -> None:
    """`delta`, TRL's name, as `dual_clip`: a ratio that is cut at it from above matters only for bad actions, because
    the clip at 1 + epsilon_high is below it."""
    if args.delta is None:
        return
    if args.dual_clip not in (None, args.delta):
        raise ConfigError("delta is TRL's name of dual_clip: set one of them", key="delta")
    if not args.delta > 1 + (args.epsilon_high or args.epsilon):
        raise ConfigError(
            f"delta caps the ratio of bad actions and must be above 1 + epsilon_high, got {args.delta}", key="delta"
        )
    args.dual_clip = args.delta


def check_loss_options(args: Any) -> None:
    """Raises `ConfigError` for options (of `OnPolicyConfig`) that contradict each other or would do nothing."""
    if args.use_bias_correction_kl and (args.kl_in != "loss" or args.kl_estimator != "k3"):
        raise ConfigError(
            "use_bias_correction_kl corrects the k3 of the loss: set kl_in: loss and kl_estimator: k3, or leave it out",
            key="use_bias_correction_kl",
        )
    defaults = {name: LossOptions.__dataclass_fields__[name].default for name in LossOptions.__dataclass_fields__}
    for name in ADAPTIVE:
        if getattr(args, name) != defaults[name] and not args.use_adaptive_entropy:
            raise ConfigError(f"{name}: only with use_adaptive_entropy: true", key=name)
    if args.use_adaptive_entropy and not args.entropy_coef_min <= args.entropy_coef <= args.entropy_coef_max:
        raise ConfigError(
            f"entropy_coef ({args.entropy_coef}) must lie between entropy_coef_min ({args.entropy_coef_min}) and "
            f"entropy_coef_max ({args.entropy_coef_max})",
            key="entropy_coef",
        )
    for name, default in defaults.items():
        kind = name.partition("_")[0]
        if kind in ("sapo", "vespo") and getattr(args, name) != default and args.loss_type != kind:
            raise ConfigError(f"{name}: only with loss_type: {kind}", key=name)


def check_used(args: Any) -> None:
    """Raises `ConfigError` for options (of `OnPolicyConfig`) that others leave without effect."""
    corrects, clips = args.rollout_correction != "none", args.loss_type not in ("cispo", "sapo", "vespo")
    found = {
        "rollout_correction_high": (corrects, "only with rollout_correction"),
        "rollout_correction_low": (corrects, "only with rollout_correction"),
        "kl_horizon": (args.kl_target is not None, "only with kl_target"),
        "kl_estimator": (args.kl_in == "loss", "only with kl_in: loss; the KL in the reward is k1"),
        "use_bias_correction_kl": (args.beta != 0, "only with a beta above 0"),
        "sync_ref_model": (args.beta != 0, "with beta: 0 nothing is trained towards the reference"),
        "off_policy_mask_threshold": (
            corrects or args.steps_per_rollout > 1,
            "with one optimiser step per rollout the policy is the one that drew; only with num_mini_batches or "
            "num_iterations above 1, or with rollout_correction",
        ),
        "epsilon": (clips, f"loss_type: {args.loss_type} has no clip below 1"),
        "epsilon_high": (clips or args.loss_type == "cispo", f"loss_type: {args.loss_type} has no clip"),
    }
    defaults = {f.name: f.default for f in fields(args)}
    for name, (used, why) in found.items():
        if not used and getattr(args, name) != defaults[name]:
            raise ConfigError(f"{name}: {why}", key=name)
