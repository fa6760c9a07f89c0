"""`reward_funcs` and `reward_processing_classes`: TRL's arguments for the rewards of its GRPO and RLOO trainers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from align.errors import ConfigError
from align.reward_models.base import Reward


def rewards_given(
    reward: Any, reward_funcs: Any, processing_classes: Any, tokenizer: Any, own: Sequence[Reward] = ()
) -> Any:
    """What `RewardColumns` takes, from `reward` or TRL's `reward_funcs`, of which one must be given.

    Args:
        reward_funcs: as `reward`; a loaded classifier with one label is scored as it is.
        processing_classes: the tokenizers of the classifiers, a list with None for functions, or one for a single
            reward; by default their own. tokenizer: the policy's. own: of environments, after the others; with them
            there need be no others.
    """
    if reward is None and reward_funcs is None:
        if own:
            return list(own)
        raise ConfigError(
            "No reward source provided: give `reward` (or reward_funcs, its name in TRL), or an environment that has a "
            "reward of its own (docs/environments.md)"
        )
    if reward is not None and reward_funcs is not None:
        raise ConfigError("give the rewards once, as `reward` (or reward_funcs, its name in TRL)")
    given = reward if reward_funcs is None else reward_funcs
    specs = list(given) if isinstance(given, list | tuple) else [given]
    several = isinstance(processing_classes, list | tuple)
    if processing_classes is None:
        processing_classes, several = [None] * len(specs), True
    tokenizers = list(processing_classes) if several else [processing_classes]
    if len(tokenizers) != len(specs):
        raise ConfigError(
            f"The number of reward processing classes ({len(tokenizers)}) must match the number of reward functions "
            f"({len(specs)})"
        )
    found = [_reward(spec, tokenizer_of, tokenizer) for spec, tokenizer_of in zip(specs, tokenizers, strict=True)]
    return [*found, *own]


def _reward(spec: Any, own: Any, tokenizer: Any) -> Any:
    from align.reward_models.classifier import ClassifierReward

    if isinstance(spec, PreTrainedModel):
        name = Path(spec.config.name_or_path).name or None
        return ClassifierReward(spec, name=name, tokenizer=own, policy_tokenizer=tokenizer)
    if own is not None and isinstance(spec, str | Path) and ":" not in str(spec):
        return ClassifierReward(spec, tokenizer=own, policy_tokenizer=tokenizer)
    return spec
