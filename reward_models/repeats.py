"""Rewards that are one reward several times, on purpose or not."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.secrets import masked_text
from align.errors import ConfigError
from align.reward_models.judge_specs import Judging
from align.reward_models.kinds import RewardSpec

if TYPE_CHECKING:
    from align.reward_models.base import Reward

logger = logging.getLogger(__name__)

# What changes no score, or, of a model, no more than its scale or its memory.
UNIMPORTANT = (
    *("name", "device", "dtype", "offload", "ranks", "batch_size", "batch_tokens", "max_length", "normalize", "beta"),
    *("concurrency", "timeout", "retries", "backoff"),
)


def warn_of_repeats(members: Sequence["RewardSpec | Reward | Path"]) -> None:
    """members: paths are folders of a saved ensemble. Judges may be asked several times on purpose: what they say is
    drawn."""
    seen: dict[str, list[str]] = {}
    for member in members:
        if not isinstance(member, Judging):
            seen.setdefault(_same(member), []).append(_shown(member))
    for names in seen.values():
        if len(names) > 1:
            logger.warning(
                "%s is several members of one ensemble: it counts as often, and agrees with itself. Name each reward "
                "once",
                names[0],
            )


def check_served(parts: Sequence["RewardSpec | Reward"], key: str) -> None:
    """ConfigError, with `key` as the place, where rewards of several models ask one vLLM server for one model: all but
    one would have the scores of another's model, which a server that knows it by a name of its own cannot tell."""
    seen: dict[tuple, Any] = {}
    for spec in leaves(parts):
        if isinstance(spec, RewardSpec) and spec.kind == "vllm":
            url, model, path = (getattr(spec, name) for name in ("url", "model", "path"))
            other = seen.setdefault((url.rstrip("/"), model), spec)
            if other.path != path:
                asked = f"{masked_text(url)} for " + ("its only model" if model is None else f"its model {model}")
                raise ConfigError(
                    f"{key}: {other.stated_name} and {spec.stated_name} are other models ({other.path}, {path}) and "
                    f"both ask {asked}: give each the url of its own server, or the name there as `model`",
                    key=key,
                )


def leaves(parts: Sequence["RewardSpec | Reward"]) -> list:
    """The rewards that they are made of, at any depth."""
    found = []
    for part in parts:
        inner = part.parts() if isinstance(part, RewardSpec) else []
        found += leaves(inner) or [part]
    return found


def _same(member: "RewardSpec | Reward | Path") -> str:
    """What two members have in common that are one."""
    if isinstance(member, Path):
        return str(member.resolve())
    if not isinstance(member, RewardSpec):
        return f"object {id(member)}"
    return repr(sorted(item for item in member.given().items() if item[0] not in UNIMPORTANT))


def _shown(member: "RewardSpec | Reward | Path") -> str:
    if isinstance(member, Path):
        return str(member)
    if not isinstance(member, RewardSpec):
        return member.name
    return str(getattr(member, "path", None) or member.stated_name or member.kind)
