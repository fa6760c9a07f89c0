"""Weights of several rewards that change while training: guided by the hypervolume, or by the objectives' gradients.

Of dynamic reward weighting (arXiv 2509.11452), on every estimator of advantages. The formulas are in
align/objectives/reward_weighting.py.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.errors import ConfigError, TrainingError
from align.objectives.reward_weighting import gradient_weights, hypervolume_gain, hypervolume_multiplier
from align.trainers.weighting.base import TASK, FixedWeights, StreamSpec, Weighting
from align.trainers.weighting.sections import GradientSection, HypervolumeSection


def check_dynamic_weights(args: Any) -> HypervolumeSection | GradientSection | None:
    """The section `dynamic_weights` of an `OnPolicyConfig`, None without; ConfigError naming what does not fit it."""
    section = args.sections.get("dynamic_weights")
    if section is None:
        return None
    if args.constraints:
        raise ConfigError(
            "dynamic_weights and constraints both decide the weights of the rewards: set one of them",
            key="dynamic_weights",
        )
    if isinstance(section, HypervolumeSection):
        if args.cancels_scale:
            raise ConfigError(
                "dynamic_weights of type hypervolume multiplies all rewards by one number, and this method divides "
                "advantages by their deviation, from which it cancels: nothing would change. Use rloo, remax, grpo "
                "with scale_rewards: none or ppo with whiten_advantages: false; or type: gradient",
                key="dynamic_weights",
            )
        if str(args.eval_strategy) in ("no", "IntervalStrategy.NO") or not args.eval_on_start:
            raise ConfigError(
                "dynamic_weights of type hypervolume learns from evaluations: set eval_strategy: steps, eval_steps and "
                "eval_on_start: true (the policy as it starts is the reference point)",
                key="dynamic_weights",
            )
    return section


class HypervolumeWeights(FixedWeights):
    """Fixed weights times one number in [0.5, 2): the larger, the more the last evaluation added to the volume that the
    evaluations dominate. Rewards with a negative weight count as smaller is better, those with weight 0 not at all.

    The volume is measured from the policy as it starts, in units of each reward's deviation there over the prompts of
    the evaluation: in raw units the reward with the largest numbers would decide.
    """

    def __init__(self, names: list[str], weights: list[float], options: HypervolumeSection | None = None):
        super().__init__(names, weights, options)
        self.objectives = [(name, 1.0 if w > 0 else -1.0) for name, w in zip(names, weights, strict=True) if w]
        if len(self.objectives) < 2:
            raise ConfigError(
                f"dynamic_weights needs at least two rewards with a weight, got {len(self.objectives)}: one is always "
                "the whole front"
            )
        self.multiplier = 1.0
        self.start: list[float] | None = None
        self.units: list[float] = []
        self.front: list[list[float]] = []

    def scores(self, rewards: dict[str, float]) -> dict[str, float]:
        return {TASK: self.multiplier * super().scores(rewards)[TASK]}

    def update(self, columns: dict[str, Tensor], lengths: Tensor) -> dict[str, float]:
        if self.start is None:
            raise ConfigError("dynamic_weights of type hypervolume needs evaluation prompts, and there are none")
        return {**super().update(columns, lengths), "dynamic_weights/multiplier": self.multiplier}

    def observe(self, evaluation: dict[str, list[float]]) -> dict[str, float]:
        means = [sign * float(np.mean(evaluation[name])) for name, sign in self.objectives]
        if self.start is None:
            self.start = means
            self.units = [float(np.std(evaluation[name])) for name, _ in self.objectives]
            flat = [name for (name, _), unit in zip(self.objectives, self.units, strict=True) if unit == 0]
            if flat:
                raise TrainingError(
                    f"{', '.join(flat)} is the same for every prompt of the first evaluation: the hypervolume has no "
                    "unit. Evaluate on more prompts, or leave the reward out"
                )
        point = [(x - low) / unit for x, low, unit in zip(means, self.start, self.units, strict=True)]
        gain = hypervolume_gain(self.front, point, [0.0] * len(point), [True] * len(point))
        if gain > 0:
            self.front.append(point)
        self.multiplier = hypervolume_multiplier(gain) if self.front else 1.0
        return {"hypervolume_gain": gain}

    def state_dict(self) -> dict:
        kept = {"multiplier": self.multiplier, "start": self.start, "units": self.units, "front": list(self.front)}
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for name in ("multiplier", "start", "units", "front"):
            setattr(self, name, state[name])


class GradientWeights(Weighting):
    """A stream per reward, with weights that sum to 1; a reward whose policy gradient agrees with the others' gains.
    The KL is a stream of its own, with weight 1."""

    def __init__(self, names: list[str], weights: list[float], options: GradientSection):
        super().__init__(names, weights, options)
        if len(names) < 2 or min(weights) <= 0:
            raise ConfigError(
                f"dynamic_weights of type gradient starts from reward_weights above 0 of at least two rewards, got "
                f"{dict(zip(names, weights, strict=True))}"
            )
        self.streams = [StreamSpec(TASK, kl=1.0), *(StreamSpec(name, penalty=1.0) for name in names)]
        self.needs_gradients, self.gradient_parameters = tuple(names), options.parameters
        self.applied = torch.tensor(weights, dtype=torch.float64) / sum(weights)

    def scores(self, rewards: dict[str, float]) -> dict[str, float]:
        return {TASK: 0.0, **{name: rewards[name] for name in self.reward_weights}}

    def weights(self) -> list[float]:
        return [1.0, *self.applied.tolist()]

    def learn_from_gradients(self, gradients: Tensor) -> dict[str, float]:
        """Move the weights by each reward's policy gradient [n, parameters]; returns what to log."""
        influence = (gradients @ gradients.sum(0)).double().cpu()
        if not influence.isfinite().all():
            raise TrainingError(f"the inner products of the objectives' gradients are {influence.tolist()}")
        rates = {"learning_rate": self.options.learning_rate, "mu": self.options.mu}
        moved = gradient_weights(self.applied, gradients.double().cpu(), **rates)
        self.applied = moved.clamp(min=1e-12) / moved.clamp(min=1e-12).sum()  # a weight of 0 could not grow again
        logged = {
            f"dynamic_weights/{name}": w for name, w in zip(self.reward_weights, self.applied.tolist(), strict=True)
        }
        return logged | {
            f"dynamic_weights/influence/{name}": x
            for name, x in zip(self.reward_weights, influence.tolist(), strict=True)
        }

    def state_dict(self) -> dict:
        return {**super().state_dict(), "applied": self.applied}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.applied = state["applied"]
