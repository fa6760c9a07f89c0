"""From the columns of the reward matrix to the streams that are estimated, and to the weights that mix them.

A stream is a column of scores with an advantage of its own. Fixed weights make one stream, the weighted sum. Under
constraints the task (the weighted sum of the rewards that are not constrained, and the KL) and every constraint are
streams, mixed by Lagrange multipliers.
"""

from dataclasses import fields

from align.errors import ConfigError
from align.objectives.constraints import Constraint
from align.objectives.multipliers import PID, Multipliers

TASK = "task"
MULTIPLIER_OPTIONS = ("form", "learning_rate", "momentum", "max_grad_norm", "initial", "bounds", "warmup", "pid")
UPDATES = ("rollout", "mini_batch")


class FixedWeights:
    """One stream: sum_i w_i r_i."""

    streams = [TASK]
    update_per = "rollout"

    def __init__(self, names: list[str], weights: list[float]):
        self.names, self.reward_weights = names, weights

    def scores(self, rewards: dict[str, float]) -> dict[str, float]:
        """The score of one completion in every stream, from its rewards by name."""
        return {TASK: sum(w * rewards[name] for w, name in zip(self.reward_weights, self.names, strict=True))}

    def weights(self) -> list[float]:
        """What each stream's advantage is multiplied by now."""
        return [1.0]

    def update(self, values: dict[str, float]) -> dict[str, float]:
        """Learn from the mean reward of each column; returns what to log."""
        return {}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class ConstrainedWeights:
    """The task and one stream per constraint (Moskovitz et al. 2023). A reward in `names` that no constraint holds is
    part of the task; with none of them the task is the KL alone, as in mu-PPO and xi-PPO."""

    def __init__(self, names: list[str], weights: list[float], constraints: list[dict], multipliers: dict | None):
        held, options, self.update_per = check_constraints(constraints, multipliers)
        unknown = [c.reward for c in held if c.reward not in names]
        if unknown:
            raise ConfigError(f"constraints name {', '.join(unknown)}, and the rewards are {', '.join(names)}")
        self.multipliers = Multipliers(held, **options)
        constrained = {c.reward for c in held}
        self.task = [(name, w) for name, w in zip(names, weights, strict=True) if name not in constrained]
        self.streams = [TASK, *(f"{c.reward}_{c.direction}" for c in held)]

    def scores(self, rewards: dict[str, float]) -> dict[str, float]:
        task = sum(w * rewards[name] for name, w in self.task)
        held = [rewards[c.reward] for c in self.multipliers.constraints]
        return dict(zip(self.streams, [task, *held], strict=True))

    def weights(self) -> list[float]:
        task, held = self.multipliers.weights()
        return [task, *held]

    def update(self, values: dict[str, float]) -> dict[str, float]:
        return self.multipliers.update(values)

    def state_dict(self) -> dict:
        return self.multipliers.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.multipliers.load_state_dict(state)


def check_constraints(constraints: list[dict] | None, multipliers: dict | None) -> tuple[list[Constraint], dict, str]:
    """The constraints, the options of their multipliers and how often these move; ConfigError naming what is wrong."""
    if not constraints:
        if multipliers is not None:
            raise ConfigError("multipliers are set, and there are no constraints")
        return [], {}, "rollout"
    held = []
    for i, entry in enumerate(constraints):
        keys = {f.name for f in fields(Constraint)}
        if not isinstance(entry, dict) or set(entry) != keys:
            raise ConfigError(f"constraints.{i} must have the keys {', '.join(sorted(keys))}, got {entry!r}")
        held.append(Constraint(entry["reward"], entry["direction"], float(entry["threshold"])))
    options = dict(multipliers or {})
    update_per = options.pop("update_per", "rollout")
    if update_per not in UPDATES:
        raise ConfigError(f"multipliers.update_per must be one of {', '.join(UPDATES)}, got {update_per!r}")
    unknown = [key for key in options if key not in MULTIPLIER_OPTIONS]
    if unknown:
        raise ConfigError(
            f"multipliers: unknown key {', '.join(unknown)}; valid: {', '.join((*MULTIPLIER_OPTIONS, 'update_per'))}"
        )
    options.setdefault("form", "tanh" if all(c.direction == "equal" for c in held) else "sigmoid")
    if options.get("pid") is not None:
        known = {f.name for f in fields(PID)}
        if not isinstance(options["pid"], dict) or not set(options["pid"]) <= known:
            raise ConfigError(f"multipliers.pid takes {', '.join(sorted(known))}, got {options['pid']!r}")
        options["pid"] = PID(**options["pid"])
    if "bounds" in options:
        options["bounds"] = tuple(options["bounds"])
    Multipliers(held, **options)  # what does not fit together is said now
    return held, options, update_per


def make_weighting(names: list[str], weights: list[float], constraints, multipliers):
    """The weighting that a configuration asks for."""
    if constraints:
        return ConstrainedWeights(names, weights, constraints, multipliers)
    return FixedWeights(names, weights)
