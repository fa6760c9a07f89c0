"""The sections `constraints` and `multipliers` of a configuration, checked."""

from dataclasses import dataclass, field, fields
from typing import Any

from align.errors import ConfigError
from align.objectives.constraints import FORMS, Constraint
from align.objectives.multipliers import PID, Multipliers

SATISFICING = ("squared", "squared_per_episode")
OPTIMISER = ("learning_rate", "momentum", "max_grad_norm", "initial")
LAGRANGIAN = (*OPTIMISER, "bounds", "warmup", "pid")
COMMON = ("form", "update_per", "estimator", "standardize", "kl_in_constraints")
CHOICES = {"update_per": ("rollout", "mini_batch"), "estimator": ("episode_mean", "token_mean")}


@dataclass
class ConstraintOptions:
    """form: sigmoid, tanh, softplus, or one of `SATISFICING`. coefficients: of these. lagrangian: keyword arguments of
    `Multipliers`. task_rewards: names, None for the rewards that no constraint holds."""

    constraints: list[Constraint]
    form: str
    task_rewards: list[str] | None
    update_per: str = "rollout"
    estimator: str = "episode_mean"
    standardize: bool = False
    kl_in_constraints: bool = False
    coefficients: list[float] = field(default_factory=list)
    lagrangian: dict = field(default_factory=dict)


def check_constraints(args: Any) -> ConstraintOptions | None:
    """The constraints of an `OnPolicyConfig`, None without; ConfigError naming what is wrong."""
    if not args.constraints:
        for name in ("multipliers", "task_rewards"):
            if getattr(args, name) is not None:
                raise ConfigError(f"{name} is set, and there are no constraints")
        return None
    held = [_constraint(entry, f"constraints.{i}") for i, entry in enumerate(args.constraints)]
    given = dict(args.multipliers or {})
    form = given.pop("form", "tanh" if all(c.direction == "equal" for c in held) else "sigmoid")
    if form not in (*FORMS, *SATISFICING):
        raise ConfigError(f"multipliers.form must be one of {', '.join((*FORMS, *SATISFICING))}, got {form!r}")
    valid = (*COMMON, *(("coefficients",) if form in SATISFICING else LAGRANGIAN))
    unknown = [key for key in given if key not in valid]
    if unknown:
        raise ConfigError(f"multipliers: {', '.join(unknown)} is no key for form {form}; valid: {', '.join(valid)}")
    common = {key: given.pop(key) for key in COMMON if key in given}
    for key, choices in CHOICES.items():
        if common.get(key, choices[0]) not in choices:
            raise ConfigError(f"multipliers.{key} must be one of {', '.join(choices)}, got {common[key]!r}")
    for key in ("standardize", "kl_in_constraints"):
        if not isinstance(common.get(key, False), bool):
            raise ConfigError(f"multipliers.{key} must be true or false, got {common[key]!r}")
    options = ConstraintOptions(held, form, args.task_rewards, **common)
    if options.kl_in_constraints and args.kl_in != "reward":
        raise ConfigError("multipliers.kl_in_constraints needs kl_in: reward")
    if options.standardize and args.whitens:
        raise ConfigError("multipliers.standardize changes nothing here: the method whitens every stream itself")
    if form in SATISFICING:
        options.coefficients = _coefficients(given.get("coefficients", 1.0), held)
        if form == "squared_per_episode" and common:
            raise ConfigError(f"multipliers: {', '.join(common)} has no meaning with form squared_per_episode")
    else:
        options.lagrangian = _lagrangian(given)
        Multipliers(held, form, **options.lagrangian)  # what does not fit together is said now
    return options


def _constraint(entry: Any, place: str) -> Constraint:
    keys = {f.name for f in fields(Constraint)}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise ConfigError(f"{place} must have the keys {', '.join(sorted(keys))}, got {entry!r}")
    try:
        threshold = float(entry["threshold"])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}.threshold must be a number, got {entry['threshold']!r}") from error
    return Constraint(entry["reward"], entry["direction"], threshold)


def _lagrangian(given: dict) -> dict:
    options = dict(given)
    if options.get("pid") is not None:
        known = [f.name for f in fields(PID)]
        if not isinstance(options["pid"], dict) or not set(options["pid"]) <= set(known):
            raise ConfigError(f"multipliers.pid takes {', '.join(known)}, got {options['pid']!r}")
        ignored = [key for key in OPTIMISER if key in options]
        if ignored:
            raise ConfigError(
                f"multipliers: {', '.join(ignored)} would be ignored beside pid, which sets the raw value"
            )
        options["pid"] = PID(**options["pid"])
    if options.get("bounds") is not None:
        if not isinstance(options["bounds"], (list, tuple)) or len(options["bounds"]) != 2:
            raise ConfigError(f"multipliers.bounds must be [smallest, largest] raw value, got {options['bounds']!r}")
        options["bounds"] = tuple(options["bounds"])
    return options


def _coefficients(given: Any, held: list[Constraint]) -> list[float]:
    wrong = [c.reward for c in held if c.direction != "equal"]
    if wrong:
        raise ConfigError(f"forms {' and '.join(SATISFICING)} aim at thresholds: {', '.join(wrong)} must be `equal`")
    listed = given if isinstance(given, list) else [given] * len(held)
    if len(listed) != len(held) or not all(isinstance(x, (int, float)) and x > 0 for x in listed):
        raise ConfigError(f"multipliers.coefficients must be a number above 0, or one per constraint, got {given!r}")
    return [float(x) for x in listed]
