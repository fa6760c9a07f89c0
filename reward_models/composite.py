"""One reward made of several named ones: their weighted sum."""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

import torch

from align.errors import ConfigError
from align.reward_models.base import Reward, RewardBatch, RewardOutput, Steps, joined, together
from align.reward_models.early import Early, begin_parts


class CompositeReward(Reward):
    """sum_i weight_i * reward_i over those that apply to a completion, unweighted columns as extras by name, their own
    extras as `<name>/<extra>`.

    Args:
        rewards: of any kind, each with a name of its own. weights: by name, each reward's; default: 1 for all.
    """

    partial_extras = True

    def __init__(
        self, rewards: Sequence[Reward], weights: Mapping[str, float] | None = None, *, name: str = "composite"
    ):
        self.name, self.rewards = name, list(rewards)
        names = [reward.name for reward in self.rewards]
        if not names:
            raise ConfigError(f"reward {name!r}: a composite needs at least one reward")
        if len(set(names)) != len(names):
            raise ConfigError(f"reward {name!r}: two of {names} have the same name: give each its own `name`")
        self.weights = {key: 1.0 for key in names} if weights is None else dict(weights)
        if set(self.weights) != set(names):
            raise ConfigError(
                f"reward {name!r}: weights are for {', '.join(sorted(map(str, self.weights)))}; the rewards are "
                f"{', '.join(names)}"
            )
        for key, weight in self.weights.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ConfigError(f"reward {name!r}: the weight of {key} must be a finite number, got {weight!r}")

    def parts(self) -> Sequence[Reward]:
        return self.rewards

    def _score(self, batch: RewardBatch) -> RewardOutput:
        return self._sum([reward.score(batch, partial=True) for reward in self.rewards])

    def begin(self, batch: RewardBatch, *, user_code: bool) -> Early | None:
        return begin_parts(self, batch, self._sum, user_code=user_code, partial=True)

    def _steps(self, batch: RewardBatch) -> Steps[RewardOutput]:
        outputs = yield from together(self.rewards, batch, partial=True)
        return self._sum(outputs)

    def _sum(self, outputs: Sequence[RewardOutput]) -> RewardOutput:
        columns = {reward.name: output for reward, output in zip(self.rewards, outputs, strict=True)}
        total = reduce(add, (self.weights[name] * output.scores.nan_to_num(0.0) for name, output in columns.items()))
        extras = {name: output.scores for name, output in columns.items()}
        for name, output in columns.items():
            extras |= {f"{name}/{key}": values for key, values in output.extras.items()}
        failed = torch.stack([o.missing if o.absent is None else o.missing & ~o.absent for o in columns.values()]).any(
            0
        )
        absent = torch.stack([output.missing for output in columns.values()]).all(0) & ~failed
        return RewardOutput(
            total.masked_fill(absent | failed, float("nan")),
            extras,
            absent=absent if absent.any() else None,
            failed=failed if failed.any() else None,
            metrics={f"{name}/{key}": v for name, output in columns.items() for key, v in output.metrics.items()},
            given=joined(output.given for output in columns.values()),
            columns={f"{name}/{key}": v for name, output in columns.items() for key, v in output.columns.items()},
        )
