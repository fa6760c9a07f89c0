"""`loss_type`: TRL's names for how a step's tokens become one loss, and for the loss of a token."""

import logging
from typing import Any

from align.errors import ConfigError

logger = logging.getLogger(__name__)

CISPO_LARGEST = 5.0  # the weight of ScaleRL, arXiv 2510.13786

# The loss_aggregation that each name stands for. bnpo is a mean over tokens like dapo: TRL's is of each micro-batch, so
# that it changes with how a step is cut; here every count is of the whole step.
LOSS_TYPES = {
    "grpo": "sequence_mean",  # Shao et al. 2024, arXiv 2402.03300
    "dapo": "token_mean",  # Yu et al. 2025, arXiv 2503.14476
    "bnpo": "token_mean",
    "dr_grpo": "constant",  # Liu et al. 2025, arXiv 2503.20783
    "cispo": "token_mean",  # MiniMax 2025, arXiv 2506.13585
    "luspo": "sequence_sum",  # arXiv 2602.05261: GSPO with each sequence's loss times its length
    "sapo": "sequence_mean",  # arXiv 2511.20347
    "vespo": "token_mean",  # arXiv 2602.10693
}


def resolve_loss_type(args: Any, default_aggregation: str) -> str:
    """The `loss_aggregation` of a configuration (`OnPolicyConfig`), whose method's own is `default_aggregation`. Raises
    `ConfigError` for options that contradict its `loss_type`."""
    kind, given = args.loss_type, args.loss_aggregation
    if kind is None:
        _warn_of_lengths(args, given)
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
        args.epsilon_high = CISPO_LARGEST if args.epsilon_high is None else args.epsilon_high
        if args.epsilon_high < 1:
            raise ConfigError(
                "loss_type: cispo takes epsilon_high as the largest importance weight itself, as in TRL: at least 1, "
                f"and 5 is usual, got {args.epsilon_high}"
            )
    if kind in UNCLIPPED and (args.importance_sampling_level != "token" or args.dual_clip is not None):
        raise ConfigError(
            f"loss_type: {kind} {UNCLIPPED[kind]}: leave importance_sampling_level and dual_clip (delta) out"
        )
    if kind == "luspo" and args.importance_sampling_level != "sequence":
        raise ConfigError("loss_type: luspo is of sequences: set importance_sampling_level: sequence")
    if kind == "vespo" and args.rollout_correction.startswith("sequence"):
        raise ConfigError(
            "loss_type: vespo has a ratio of sequences itself: set rollout_correction: token_truncate or token_mask"
        )
    if kind != "luspo":
        _warn_of_lengths(args, LOSS_TYPES[kind])
    return LOSS_TYPES[kind]


UNCLIPPED = {
    "cispo": "weighs single tokens and cuts the weights alone",
    "sapo": "has a soft gate of single tokens instead of a clip",
    "vespo": "weighs sequences by a smooth function of their ratio instead of a clip",
}


def _warn_of_lengths(args: Any, aggregation: str) -> None:
    if args.importance_sampling_level == "sequence" and aggregation != "sequence_mean":
        logger.warning(
            "importance_sampling_level: sequence with loss_aggregation: %s weights each sequence by its completion "
            "length, which GSPO does not: loss_type: grpo (loss_aggregation: sequence_mean) is its objective",
            aggregation,
        )
