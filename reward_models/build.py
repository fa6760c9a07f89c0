"""Rewards from what a configuration file says."""

import difflib
from pathlib import Path
from typing import Any

from align.errors import ConfigError, RewardError
from reward_models.base import Reward
from reward_models.classifier import ClassifierReward
from reward_models.ensemble import FILE_NAME, RewardEnsemble, ensemble_members
from reward_models.implicit import ImplicitReward
from reward_models.rules import RuleReward

KEYS = {
    "classifier": ("path", "name", "normalize", "max_length", "batch_tokens", "batch_size", "dtype", "device"),
    "implicit": ("path", "reference", "beta", "name", "max_length", "batch_tokens", "dtype", "device"),
    "rule": ("function", "name"),
    "ensemble": ("members", "path", "aggregation", "lambda", "ddof", "name", "normalize"),
}


def build_reward(spec: Any, *, tokenizer=None, device=None) -> Reward:
    """The reward that `spec` describes (docs/rewards.md).

    spec: a `Reward` (returned as it is), a function, a mapping with `type` classifier, rule or ensemble, or a text: the
    folder or hub name of a classifier, or a rule if it contains a colon. tokenizer: the policy's, so that its token ids
    can be scored. device: for models; default: a GPU if there is one. Raises `ConfigError` naming the key.
    """
    if isinstance(spec, Reward):
        return spec
    if callable(spec):
        return RuleReward(spec)
    if isinstance(spec, (str, Path)):
        text = str(spec)
        if not text:
            raise ConfigError("a reward is empty: name a classifier's folder or a function")
        spec = {"type": "rule", "function": text} if ":" in text else {"type": "classifier", "path": text}
    if not isinstance(spec, dict):
        raise ConfigError(f"a reward is a mapping or a text, got {type(spec).__name__}: {spec!r}")
    kind = spec.get("type")
    if kind not in KEYS:
        raise ConfigError(f"reward {spec!r:.100}: type must be one of {', '.join(KEYS)}, got {kind!r}")
    options = {key: value for key, value in spec.items() if key != "type"}
    _check_keys(kind, options)
    return _BUILDERS[kind](options, tokenizer, device)


def _classifier(options: dict, tokenizer, device) -> Reward:
    path = _required("classifier", options, "path")
    if (Path(path) / FILE_NAME).exists():
        raise ConfigError(
            f"{path} holds an ensemble: write {{type: ensemble, path: {path}, aggregation: uwo, lambda: 0.5}}, or name "
            "one of its members"
        )
    options = {"device": device, **{k: v for k, v in options.items() if k != "path"}}
    return ClassifierReward(path, policy_tokenizer=tokenizer, **options)


def _implicit(options: dict, tokenizer, device) -> Reward:
    path = _required("implicit", options, "path")
    options = {"device": device, **{k: v for k, v in options.items() if k != "path"}}
    return ImplicitReward(path, policy_tokenizer=tokenizer, **options)


def _rule(options: dict, tokenizer, device) -> Reward:
    return RuleReward(_required("rule", options, "function"), name=options.get("name"))


def _ensemble(options: dict, tokenizer, device) -> Reward:
    normalize = options.get("normalize", True)
    members = options.get("members")
    if (members is None) == ("path" not in options):
        raise ConfigError("reward of type ensemble: give either members (a list of rewards) or path (a saved ensemble)")
    if members is None:
        members = [{"type": "classifier", "path": str(p), "name": p.name} for p in ensemble_members(options["path"])]
    if not isinstance(members, list) or not members:
        raise ConfigError(f"reward of type ensemble: members must be a list of rewards, got {members!r}")
    rule = {"aggregation": _required("ensemble", options, "aggregation"), "ddof": options.get("ddof", 0)}
    built = [build_reward(_raw(m) if normalize is False else m, tokenizer=tokenizer, device=device) for m in members]
    name = options.get("name") or (Path(options["path"]).name if "path" in options else "ensemble")
    try:
        return RewardEnsemble(built, **rule, lambda_=options.get("lambda"), name=name, normalize=normalize)
    except RewardError as error:
        raise ConfigError(str(error)) from error


def _raw(member: Any) -> Any:
    """A member spec that leaves its normaliser out, unless it says otherwise itself."""
    if isinstance(member, str) and ":" not in member:
        member = {"type": "classifier", "path": member}
    if isinstance(member, dict) and member.get("type") == "classifier":
        return {"normalize": False, **member}
    return member


_BUILDERS = {"classifier": _classifier, "implicit": _implicit, "rule": _rule, "ensemble": _ensemble}


def _check_keys(kind: str, options: dict) -> None:
    for key in options:
        if key not in KEYS[kind]:
            near = difflib.get_close_matches(str(key), KEYS[kind], n=1)
            hint = f"nearest valid: {near[0]}" if near else f"valid: {', '.join(KEYS[kind])}"
            raise ConfigError(f"reward of type {kind}: unknown key {key!r} ({hint})")


def _required(kind: str, options: dict, key: str) -> Any:
    if not options.get(key):
        raise ConfigError(f"reward of type {kind} needs {key!r}: {options!r:.100}")
    return options[key]
