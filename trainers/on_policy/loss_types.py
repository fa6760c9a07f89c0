"""`loss_type`: TRL's names for how a step's tokens become one loss, and for CISPO's loss of a token."""

from typing import Any

from align.errors import ConfigError

# The loss_aggregation that each name stands for. bnpo is a mean over tokens like dapo: TRL's is of each micro-batch, so
# that it changes with how a step is cut; here every count is of the whole step.
LOSS_TYPES = {
    "grpo": "sequence_mean",  # Shao et al. 2024, arXiv 2402.03300
    "dapo": "token_mean",  # Yu et al. 2025, arXiv 2503.14476
    "bnpo": "token_mean",
    "dr_grpo": "constant",  # Liu et al. 2025, arXiv 2503.20783
    "cispo": "token_mean",  # MiniMax 2025, arXiv 2506.13585
    "luspo": "sequence_sum",  # arXiv 2602.05261: GSPO with each sequence's loss times its length
}


def resolve_loss_type(args: Any, default_aggregation: str) -> str:
    """The `loss_aggregation` of a configuration (`OnPolicyConfig`), whose method's own is `default_aggregation`. Raises
    `ConfigError` for options that contradict its `loss_type`."""
    kind, given = args.loss_type, args.loss_aggregation
    if kind is None:
        return given
    if kind not in LOSS_TYPES:
        raise ConfigError(
            f"loss_type must be one of {', '.join(LOSS_TYPES)}, or null for loss_aggregation alone, got {kind!r}"
        )
    if given not in (default_aggregation, LOSS_TYPES[kind]):
        raise ConfigError(
            f"loss_type: {kind} is loss_aggregation: {LOSS_TYPES[kind]}, and {given} is given: leave one of them out"
        )
    if kind == "cispo":
        if args.epsilon_high is None or args.epsilon_high < 1:
            raise ConfigError(
                "loss_type: cispo takes epsilon_high as the largest importance weight itself, as in TRL: at least 1, "
                f"and 5 is usual, got {args.epsilon_high}"
            )
        if args.importance_sampling_level != "token" or args.dual_clip is not None:
            raise ConfigError(
                "loss_type: cispo weighs single tokens and cuts the weights alone: leave importance_sampling_level "
                "and dual_clip out"
            )
    if kind == "luspo" and args.importance_sampling_level != "sequence_mean":
        raise ConfigError(
            "loss_type: luspo is of sequences: set importance_sampling_level: sequence_mean (which TRL calls sequence)"
        )
    return LOSS_TYPES[kind]
