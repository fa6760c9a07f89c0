"""Weightings with thresholds: Lagrange multipliers (mu-, xi- and All-PPO) and squared penalties (PPO-SAT).

Of Moskovitz et al. 2023 (arXiv 2310.04373), for every estimator of advantages. The multipliers move before the policy
does, by the same rollout (or mini-batch): alternating steps circle the saddle point less than simultaneous ones.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from align.errors import ConfigError
from align.objectives.constraints import Constraint, constraint_value, sat_reward_released, sat_weights
from align.objectives.multipliers import Multipliers
from align.trainers.weighting.base import TASK, StreamSpec, Weighting, weighted_sum
from align.trainers.weighting.options import ConstraintOptions
from align.trainers.weighting.watch import ConstraintWatch


class Constrained(Weighting):
    """The task and one stream per constraint. The task is the weighted sum of `task_rewards` (by default of the rewards
    that no constraint holds) less the KL: the KL alone where there are none, as in mu-PPO and xi-PPO."""

    def __init__(self, names: list[str], weights: list[float], options: ConstraintOptions):
        super().__init__(names, weights)
        self.options, self.constraints = options, options.constraints
        self.update_per, self.standardize = options.update_per, options.standardize
        held = {c.reward for c in self.constraints}
        task = [name for name in names if name not in held] if options.task_rewards is None else options.task_rewards
        for what, found in (("constraints", sorted(held)), ("task_rewards", task)):
            unknown = [name for name in found if name not in names]
            if unknown:
                raise ConfigError(f"{what} name {', '.join(unknown)}, and the rewards are {', '.join(names)}")
        unused = [name for name in names if name not in held and name not in task]
        if unused:
            raise ConfigError(
                f"{', '.join(unused)} is neither constrained nor among task_rewards: it would only cost time"
            )
        self.task = {name: w for name, w in zip(names, weights, strict=True) if name in task}
        kl = 1.0 if options.kl_in_constraints else 0.0
        self.streams = [
            # beside rewards only: alone in its stream, a penalty would have the same effect whatever its size
            StreamSpec(TASK, kl=1.0, penalty=1.0 if self.task else 0.0),
            *(StreamSpec(f"{c.reward}_{c.direction}", kl) for c in self.constraints),
        ]

    def scores(self, rewards: dict[str, float]) -> dict[str, float]:
        columns = [weighted_sum(rewards, self.task), *(rewards[c.reward] for c in self.constraints)]
        return {stream.name: score for stream, score in zip(self.streams, columns, strict=True)}

    def update(self, columns: dict[str, Tensor], lengths: Tensor) -> dict[str, float]:
        super().update(columns, lengths)
        names = {c.reward for c in self.constraints}
        return self.move({name: constraint_value(columns[name], lengths, self.options.estimator) for name in names})

    @abstractmethod
    def move(self, values: dict[str, float]) -> dict[str, float]:
        """Learn from the value of every constrained reward; returns what to log."""

    def restart(self) -> None:
        """As above; here nothing is learned yet."""

    def set_thresholds(self, thresholds: dict[str, float]) -> None:
        self.constraints[:] = [
            Constraint(c.reward, c.direction, thresholds.get(c.reward, c.threshold)) for c in self.constraints
        ]


class ConstrainedWeights(Constrained):
    """Lagrange multipliers, one per constraint."""

    def __init__(self, names: list[str], weights: list[float], options: ConstraintOptions):
        super().__init__(names, weights, options)
        self.restart()

    def restart(self) -> None:
        self.multipliers = Multipliers(self.constraints, self.options.form, **self.options.lagrangian)
        self.constraints = self.multipliers.constraints
        self.watch = ConstraintWatch(len(self.constraints))

    def weights(self) -> list[float]:
        task, held = self.multipliers.weights()
        return [task, *held]

    def move(self, values: dict[str, float]) -> dict[str, float]:
        logged = self.multipliers.update(values)
        self.messages += self.watch.observe(self.multipliers, values)
        return logged

    def state_dict(self) -> dict:
        kept = {"multipliers": self.multipliers.state_dict(), "watch": self.watch.state_dict()}
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.multipliers.load_state_dict(state["multipliers"])
        self.watch.load_state_dict(state["watch"])


class RewardStreams(ConstrainedWeights):
    """One stream per reward, constrained or not, with its weight in the task and its multipliers added up: All-PPO as
    released, whose task advantage is the sum of the rewards' own advantages, standardised apart.

    The KL is inside every reward of the task, and inside the others with `kl_in_constraints`. So it counts as often as
    there are streams that hold it: for two rewards, both in the task with weight 1 and both at most their thresholds,
    (2 - s_1 - s_2) * 2 - s_1 - s_2 = 4 - 3 (s_1 + s_2).
    """

    def __init__(self, names: list[str], weights: list[float], options: ConstraintOptions):
        super().__init__(names, weights, options)
        if not self.task:
            raise ConfigError("multipliers.task_apart needs task_rewards: without one the KL would be in no stream")
        rest = 1.0 if options.kl_in_constraints else 0.0
        # no penalty: the multipliers of a constrained reward can turn it into a gain
        self.streams = [StreamSpec(name, kl=1.0 if name in self.task else rest) for name in names]

    def scores(self, rewards: dict[str, float]) -> dict[str, float]:
        return {stream.name: rewards[stream.name] for stream in self.streams}

    def weights(self) -> list[float]:
        task, held = self.multipliers.weights()
        total = {stream.name: task * self.task.get(stream.name, 0.0) for stream in self.streams}
        for constraint, weight in zip(self.constraints, held, strict=True):
            total[constraint.reward] += weight
        return list(total.values())


class SatisficingWeights(Constrained):
    """PPO-SAT on the batch mean: the gradient of task - sum_i a_i (v_i - theta_i)^2, v_i the mean of the batch."""

    def __init__(self, names: list[str], weights: list[float], options: ConstraintOptions):
        super().__init__(names, weights, options)
        self.restart()

    def restart(self) -> None:
        self.applied = [0.0] * len(self.constraints)

    def weights(self) -> list[float]:
        return [1.0, *self.applied]

    def move(self, values: dict[str, float]) -> dict[str, float]:
        reached = torch.tensor([values[c.reward] for c in self.constraints], dtype=torch.float64)
        thresholds = torch.tensor([c.threshold for c in self.constraints], dtype=torch.float64)
        coefficients = torch.tensor(self.options.coefficients, dtype=torch.float64)
        self.applied = sat_weights(reached, thresholds, coefficients).tolist()
        logged = {"constraints/task_weight": 1.0}
        for c, weight in zip(self.constraints, self.applied, strict=True):
            value = values[c.reward]
            numbers = {"value": value, "threshold": c.threshold, "violation": c.violation(value), "weight": weight}
            logged |= {f"constraints/{c.reward}_{c.direction}/{name}": number for name, number in numbers.items()}
        return logged

    def state_dict(self) -> dict:
        return {**super().state_dict(), "applied": self.applied}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.applied = state["applied"]


class SatisficingPerEpisode(Constrained):
    """PPO-SAT as released: every completion's own distance to the thresholds, in one stream. A reward of 0 or 1 is
    pushed to one end, never to its threshold (`sat_reward_released`)."""

    def __init__(self, names: list[str], weights: list[float], options: ConstraintOptions):
        super().__init__(names, weights, options)
        self.streams = [StreamSpec(TASK, kl=1.0, penalty=1.0)]

    def scores(self, rewards: dict[str, float]) -> dict[str, float]:
        row = torch.tensor([[rewards[c.reward] for c in self.constraints]], dtype=torch.float64)
        thresholds = torch.tensor([c.threshold for c in self.constraints], dtype=torch.float64)
        coefficients = torch.tensor(self.options.coefficients, dtype=torch.float64)
        return {TASK: weighted_sum(rewards, self.task) + sat_reward_released(row, thresholds, coefficients).item()}

    def move(self, values: dict[str, float]) -> dict[str, float]:
        return {
            f"constraints/{c.reward}_{c.direction}/{name}": number
            for c in self.constraints
            for name, number in (
                ("value", values[c.reward]),
                ("threshold", c.threshold),
                ("violation", c.violation(values[c.reward])),
            )
        }
