"""Rewards from what a configuration file says."""

import difflib
from pathlib import Path
from typing import Any

from align.errors import ConfigError, RewardError
from align.objectives.ensemble import check_rule
from align.reward_models.base import Reward
from align.reward_models.classifier import ClassifierReward
from align.reward_models.composite import CompositeReward
from align.reward_models.ensemble import FILE_NAME, RewardEnsemble, ensemble_members, load_ensemble, models_held
from align.reward_models.implicit import ImplicitReward
from align.reward_models.remote import RemoteReward
from align.reward_models.rules import RuleReward
from align.reward_models.verifier import VerifierReward

KEYS = {
    "classifier": ("path", "name", "normalize", "max_length", "batch_tokens", "batch_size", "dtype", "device"),
    "implicit": ("path", "reference", "beta", "name", "max_length", "batch_tokens", "dtype", "device"),
    "rule": ("function", "name", "arguments", "batch_size", "concurrency"),
    "verifier": ("function", "name", "on_pass", "on_fail", "on_none", "arguments", "concurrency"),
    "remote": (
        *("url", "name", "columns", "headers", "batch_size", "concurrency"),
        *("timeout", "retries", "backoff"),
    ),
    "composite": ("rewards", "weights", "name"),
    "ensemble": (
        *("members", "path", "aggregation", "lambda", "quantile", "ddof", "name", "normalize"),
        *("max_length", "batch_tokens"),
    ),
}
REQUIRED = {  # the first argument of the class
    "classifier": "path",
    "implicit": "path",
    "rule": "function",
    "verifier": "function",
    "remote": "url",
    "composite": "rewards",
    "ensemble": "aggregation",
}
LIGHT = ("rule", "verifier", "remote")  # made without reading a model or asking a server


def build_reward(spec: Any, *, tokenizer=None, device=None) -> Reward:
    """The reward that `spec` describes (docs/rewards.md).

    spec: a `Reward` (returned as it is), a function, a mapping with `type`, or a text: the folder or hub name of a
    classifier, or a rule if it contains a colon. tokenizer: the policy's, so that its token ids can be scored. device:
    for models; default: a GPU if there is one. Raises `ConfigError` naming the key.
    """
    if isinstance(spec, Reward):
        return spec
    if callable(spec):
        return RuleReward(spec)
    kind, options = parse_spec(spec)
    return _BUILDERS[kind](options, tokenizer, device)


def check_reward(spec: Any) -> None:
    """Raise an error for a spec that `build_reward` would refuse, as far as that can be told without loading a model:
    functions are imported, no server is asked."""
    if isinstance(spec, Reward) or callable(spec):
        return
    kind, options = parse_spec(spec)
    if kind in LIGHT:
        _BUILDERS[kind](options, None, None)
    elif kind == "classifier":
        _refuse_ensemble(options["path"])
    nested = nested_specs(kind, options)
    if kind == "ensemble":
        count = len(nested) if "members" in options else len(ensemble_members(options["path"]))
        rule = [options.get(key) for key in ("lambda", "ddof", "quantile")]
        check_rule(options["aggregation"], count, rule[0], rule[1] or 0, rule[2])
    for spec in nested:
        check_reward(spec)


def model_paths(spec: Any) -> dict[str, bool]:
    """Folders and hub names of the models that a spec needs, each once; True for those with a score head."""
    if isinstance(spec, Reward) or callable(spec):
        return {}
    kind, options = parse_spec(spec)
    paths = {str(options["path"]): True} if kind == "classifier" else {}
    if kind == "implicit":
        paths = {str(options[key]): False for key in ("path", "reference") if key in options}
    if kind == "ensemble" and "path" in options:
        paths = {str(path): True for path in models_held(options["path"])}
    for nested in nested_specs(kind, options):
        paths |= model_paths(nested)
    return paths


def nested_specs(kind: str, options: dict) -> list:
    """The specs that a spec of this kind is made of: members of an ensemble, rewards of a composite."""
    if kind == "composite":
        return _list(kind, options, "rewards")
    if kind != "ensemble":
        return []
    if ("members" in options) == ("path" in options):
        raise ConfigError("reward of type ensemble: give either members (a list of rewards) or path (a saved ensemble)")
    return _list(kind, options, "members") if "members" in options else []


# ---- kinds ----------------------------------------------------------------------------------------------------------


def _classifier(options: dict, tokenizer, device) -> Reward:
    _refuse_ensemble(options["path"])
    return ClassifierReward(options.pop("path"), policy_tokenizer=tokenizer, **{"device": device, **options})


def _refuse_ensemble(path: str) -> None:
    if (Path(path) / FILE_NAME).exists():
        raise ConfigError(
            f"{path} holds an ensemble: write {{type: ensemble, path: {path}, aggregation: uwo, lambda: 0.5}}, or name "
            "one of its members"
        )


def _implicit(options: dict, tokenizer, device) -> Reward:
    return ImplicitReward(options.pop("path"), policy_tokenizer=tokenizer, **{"device": device, **options})


def _rule(options: dict, tokenizer, device) -> Reward:
    return RuleReward(**options)


def _verifier(options: dict, tokenizer, device) -> Reward:
    return VerifierReward(**options)


def _remote(options: dict, tokenizer, device) -> Reward:
    return RemoteReward(**options)


def _composite(options: dict, tokenizer, device) -> Reward:
    built = [build_reward(spec, tokenizer=tokenizer, device=device) for spec in nested_specs("composite", options)]
    return CompositeReward(built, **{key: value for key, value in options.items() if key != "rewards"})


def _ensemble(options: dict, tokenizer, device) -> Reward:
    members, normalize = nested_specs("ensemble", options), options.get("normalize", True)
    rule = {key: options[key] for key in ("aggregation", "ddof", "quantile") if key in options}
    rule |= {"lambda_": options.get("lambda"), "normalize": normalize}
    of_models = {key: options[key] for key in ("max_length", "batch_tokens") if key in options}
    try:
        if "path" in options:
            models = {"policy_tokenizer": tokenizer, "device": device, **of_models}
            return load_ensemble(options["path"], **rule, **models, name=options.get("name"))
        if of_models:
            raise ConfigError(f"{', '.join(of_models)} of an ensemble belong to path: set them for each of the members")
        built = [build_reward(m if normalize else _raw(m), tokenizer=tokenizer, device=device) for m in members]
        return RewardEnsemble(built, **rule, name=options.get("name", "ensemble"))
    except RewardError as error:
        raise ConfigError(str(error)) from error


def _raw(member: Any) -> Any:
    """A member spec that leaves its normaliser out, unless it says otherwise itself."""
    if isinstance(member, str) and ":" not in member:
        member = {"type": "classifier", "path": member}
    if isinstance(member, dict) and member.get("type") == "classifier":
        return {"normalize": False, **member}
    return member


_BUILDERS = {
    "classifier": _classifier,
    "implicit": _implicit,
    "rule": _rule,
    "verifier": _verifier,
    "remote": _remote,
    "composite": _composite,
    "ensemble": _ensemble,
}


# ---- what is in a spec ----------------------------------------------------------------------------------------------


def parse_spec(spec: Any) -> tuple[str, dict]:
    """(type, a copy of the other keys), their names checked."""
    if isinstance(spec, (str, Path)):
        text = str(spec)
        if not text:
            raise ConfigError("a reward is empty: name a classifier's folder or a function")
        spec = {"type": "rule", "function": text} if ":" in text else {"type": "classifier", "path": text}
    if not isinstance(spec, dict):
        raise ConfigError(f"a reward is a mapping or a text, got {type(spec).__name__}: {spec!r}")
    kind = spec.get("type")
    if kind not in KEYS:
        near = difflib.get_close_matches(str(kind), KEYS, n=1)
        hint = f" (nearest valid: {near[0]})" if near else ""
        raise ConfigError(f"reward {spec!r:.100}: type must be one of {', '.join(KEYS)}, got {kind!r}{hint}")
    options = {key: value for key, value in spec.items() if key != "type"}
    for key in options:
        if key not in KEYS[kind]:
            near = difflib.get_close_matches(str(key), KEYS[kind], n=1)
            hint = f"nearest valid: {near[0]}" if near else f"valid: {', '.join(KEYS[kind])}"
            raise ConfigError(f"reward of type {kind}: unknown key {key!r} ({hint})")
    if not options.get(REQUIRED[kind]):
        raise ConfigError(f"reward of type {kind} needs {REQUIRED[kind]!r}: {options!r:.100}")
    return kind, options


def _list(kind: str, options: dict, key: str) -> list:
    if not isinstance(options[key], list) or not options[key]:
        raise ConfigError(f"reward of type {kind}: {key} must be a list of rewards, got {options[key]!r}")
    return options[key]
