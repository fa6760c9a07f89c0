"""What the sections `constraints` and `multipliers` say together, and with the other options."""

from dataclasses import dataclass, field
from typing import Any

from align.errors import ConfigError
from align.objectives.constraints import Constraint, check_together
from align.objectives.multipliers import PID, Multipliers
from align.trainers.weighting.sections import (
    ConstraintSection,
    LagrangianSection,
    SearchSection,
    SquaredPerEpisodeSection,
    SquaredSection,
    Updates,
)


@dataclass
class ConstraintOptions:
    """form: sigmoid, tanh, softplus, squared or squared_per_episode. coefficients: of the last two. lagrangian: keyword
    arguments of `Multipliers`. task_rewards: names, None for the rewards that no constraint holds."""

    constraints: list[Constraint]
    form: str
    task_rewards: list[str] | None
    update_per: str = "rollout"
    estimator: str = "episode_mean"
    standardize: bool = False
    kl_in_constraints: bool = False
    task_apart: bool = False
    coefficients: list[float] = field(default_factory=list)
    lagrangian: dict = field(default_factory=dict)


def check_constraints(args: Any) -> ConstraintOptions | None:
    """The constraints of an `OnPolicyConfig`, None without; ConfigError naming what does not fit together."""
    if not args.sections.get("constraints"):
        for name in ("multipliers", "task_rewards"):
            if getattr(args, name) is not None:
                raise ConfigError(f"{name} is set, and there are no constraints", key=name)
        return None
    search = args.sections.get("threshold_search")
    held = [Constraint(c.reward, c.direction, _threshold(c, search)) for c in args.sections["constraints"]]
    section = args.sections.get("multipliers", LagrangianSection())
    form = section.form or ("tanh" if all(c.direction == "equal" for c in held) else "sigmoid")
    common = {name: getattr(section, name) for name in Updates.model_fields if isinstance(section, Updates)}
    options = ConstraintOptions(held, form, args.task_rewards, **common)
    if options.kl_in_constraints and (args.kl_in != "reward" or not args.beta):
        raise ConfigError(
            "multipliers.kl_in_constraints needs kl_in: reward and a beta above 0", key="multipliers.kl_in_constraints"
        )
    if args.dynamic_sampling_rounds:
        raise ConfigError(
            "constraints look at the mean of a reward over the rollout, which would be that of the prompts that "
            "dynamic_sampling_rounds leaves: what is always or never right is not among them. Leave one of them out",
            key="dynamic_sampling_rounds",
        )
    if options.standardize and args.whitens:
        raise ConfigError(
            "multipliers.standardize changes nothing here: the method whitens every stream itself",
            key="multipliers.standardize",
        )
    if isinstance(section, SquaredSection | SquaredPerEpisodeSection):
        check_together(held)
        options.coefficients = _coefficients(section.coefficients, held)
    else:
        given = {name: getattr(section, name) for name in section.model_fields_set}
        options.task_apart = section.task_apart
        ours = {"form", "task_apart", *common}
        options.lagrangian = {name: value for name, value in given.items() if name not in ours}
        if section.pid is not None:
            options.lagrangian["pid"] = PID(**section.pid.given())
        Multipliers(held, form, **options.lagrangian)  # raises ConfigError for options that do not fit together
    return options


def _threshold(section: ConstraintSection, search: SearchSection | None) -> float:
    """As given; with a search, where that begins. ConfigError where there is none, or one that the search replaces."""
    if search is not None and section.threshold is not None:
        raise ConfigError(
            f"constraints: threshold_search finds the threshold of {section.reward}: leave out {section.threshold:g}",
            key="constraints",
        )
    if search is not None:
        return search.start.get(section.reward, 0.0)
    if section.threshold is None:
        raise ConfigError(
            f"constraints: {section.reward} has no threshold: write one, or have it found (threshold_search)",
            key="constraints",
        )
    return section.threshold


def _coefficients(given: float | list[float], held: list[Constraint]) -> list[float]:
    wrong = [c.reward for c in held if c.direction != "equal"]
    if wrong:
        raise ConfigError(
            f"multipliers: the squared forms aim at thresholds: {', '.join(wrong)} must be `equal`", key="multipliers"
        )
    listed = given if isinstance(given, list) else [given] * len(held)
    if len(listed) != len(held) or not all(x > 0 for x in listed):
        raise ConfigError(
            f"multipliers.coefficients must be a number above 0, or one per constraint, got {given!r}",
            key="multipliers.coefficients",
        )
    return [float(x) for x in listed]
