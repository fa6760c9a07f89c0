"""Rewards from what a configuration file says. The kinds and their options are in `align.reward_models.specs`."""

from typing import Any

from align.reward_models.base import Reward
from align.reward_models.specs import parse_reward


def build_reward(spec: Any, *, tokenizer=None, device=None) -> Reward:
    """The reward that `spec` describes (docs/rewards.md).

    spec: a `Reward` (returned as it is), a `RewardSpec`, a function, a mapping with `type`, or a text: the folder or
    hub name of a classifier, or a rule if it contains a colon. tokenizer: the policy's, so that its token ids can be
    scored. device: for models; default: a GPU if there is one. Raises `ConfigError` naming the key.
    """
    parsed = parse_reward(spec)
    return parsed if isinstance(parsed, Reward) else parsed.build(tokenizer, device)


def check_reward(spec: Any) -> None:
    """Raise an error for a spec that `build_reward` would refuse, as far as that can be told without loading a model:
    functions are imported, no server is asked."""
    parsed = parse_reward(spec)
    if not isinstance(parsed, Reward):
        parsed.check()


def model_paths(spec: Any) -> dict[str, bool]:
    """Folders and hub names of the models that a spec needs, each once; True for those with a score head."""
    parsed = parse_reward(spec)
    return {} if isinstance(parsed, Reward) else parsed.models()


def model_ranks(spec: Any) -> dict[str, set[int] | None]:
    """The ranks of the run that load each model of `model_paths`, None for all."""
    parsed = parse_reward(spec)
    if isinstance(parsed, Reward):
        return {}
    of_parts = [model_ranks(part) for part in parsed.parts()]
    if not of_parts:
        ranks = parsed.model_ranks
        return dict.fromkeys(parsed.models(), None if ranks is None else set(ranks))
    found: dict[str, set[int] | None] = {}
    for ranks_of in of_parts:
        join_ranks(found, ranks_of)
    return found


def join_ranks(found: dict[str, set[int] | None], more: dict[str, set[int] | None]) -> None:
    """Add what loads the models of another reward."""
    for path, ranks in more.items():
        before = found.get(path, set())
        found[path] = None if ranks is None or before is None else before | ranks
