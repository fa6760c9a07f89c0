"""Lagrange multipliers that follow the violation of constraints. Their state is saved and resumed with the run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from align.errors import ConfigError, TrainingError
from align.objectives.constraints import (
    FORMS,
    Constraint,
    applied_weights,
    check_together,
    squash,
    squash_slope,
)

SATURATED = 0.1  # of the largest slope: from there on a multiplier takes ten times as long to come back
STEEPEST = {"sigmoid": 0.25, "tanh": 1.0, "softplus": 1.0}
# Where the slope is a hundredth of the largest: beyond it a multiplier would hardly ever come back.
BOUNDS = {"sigmoid": (-6.0, 6.0), "tanh": (-3.0, 3.0), "softplus": (-6.0, 8.0)}


@dataclass(frozen=True)
class PID:
    """Gains of a PID controller on the violation (Stooke et al. 2020, arXiv 2007.03964) instead of gradient descent."""

    kp: float = 1.0
    ki: float = 0.1
    kd: float = 0.0
    integral_bound: float = 10.0


def _check_form(form: str, constraints: Sequence[Constraint]) -> None:
    """ConfigError for a form that cannot hold some of the constraints."""
    wrong = [c.reward for c in constraints if (c.direction == "equal") != (form == "tanh")]
    if not wrong:
        return
    if 0 < sum(c.direction == "equal" for c in constraints) < len(constraints):
        raise ConfigError(
            "constraints that are equal do not go together with at_least and at_most: their multipliers have other "
            "forms. Write an equality as a band, at_least and at_most with (nearly) the same threshold"
        )
    raise ConfigError(
        f"multiplier form {form!r} does not fit {', '.join(wrong)}: equal takes tanh (its multiplier may be "
        "negative), at_least and at_most take sigmoid or softplus"
    )


class Multipliers:
    """One raw value per constraint, squashed to a multiplier.

    Gradient descent on L(l) = sum_i s(l_i) * slack_i (eq. 4.2, its minimisation over the multipliers): the derivative
    of the squashing multiplies the slack, momentum is the classical one, and the gradient vector's norm is clipped.
    With `pid` the raw value is kp * e + ki * sum e + kd * change of e, e = -slack; the sum stands still while the
    multiplier is at its limit in the direction of e.

    Args:
        form: sigmoid, tanh or softplus. Inequalities cannot be held with tanh, whose multiplier turns negative, nor
            equalities with the other two, which cannot.
        learning_rate, momentum, max_grad_norm: 0.1, 0.1, 0.5 in the paper.
        initial: the raw value to start from; 0 in the paper (sigmoid 0.5, tanh 0).
        bounds: smallest and largest raw value; None takes those of `BOUNDS`.
        warmup: updates during which the multipliers are measured but not moved.
    """

    def __init__(
        self,
        constraints: Sequence[Constraint],
        form: str,
        *,
        learning_rate: float = 0.1,
        momentum: float = 0.1,
        max_grad_norm: float | None = 0.5,
        initial: float | Sequence[float] = 0.0,
        bounds: tuple[float, float] | None = None,
        warmup: int = 0,
        pid: PID | None = None,
    ):
        self.constraints, self.form = list(constraints), form
        if not self.constraints:
            raise ConfigError("there is no constraint to hold")
        if form not in FORMS:
            raise ConfigError(f"multiplier form must be one of {', '.join(FORMS)}, got {form!r}")
        check_together(self.constraints)
        _check_form(form, self.constraints)
        bounds = BOUNDS[form] if bounds is None else bounds
        if not bounds[0] < bounds[1]:
            raise ConfigError(f"multiplier bounds must rise, got {bounds}")
        self.learning_rate, self.momentum, self.max_grad_norm = learning_rate, momentum, max_grad_norm
        self.bounds, self.warmup, self.pid = bounds, warmup, pid
        start = torch.as_tensor(initial, dtype=torch.float64)
        if start.numel() not in (1, len(self.constraints)):
            raise ConfigError(f"initial has {start.numel()} raw values for {len(self.constraints)} constraints")
        outside = start[(start < bounds[0]) | (start > bounds[1])].tolist()
        if any(outside):  # 0, where none is given, moves into bounds that do not hold it
            raise ConfigError(f"initial has raw values outside the bounds {list(bounds)}: {outside}")
        self.raw = start.expand(len(self.constraints)).clone().clamp(*bounds)
        self.velocity: torch.Tensor | None = None
        self.integral = torch.zeros_like(self.raw)
        self.last_error: torch.Tensor | None = None
        self.updates = 0

    def weights(self) -> tuple[float, list[float]]:
        """What the task's and each constraint's advantage are multiplied by now."""
        task, constraints = applied_weights(self.raw, self.form, self.constraints)
        return task.item(), constraints.tolist()

    def update(self, values: dict[str, float]) -> dict[str, float]:
        """Move the multipliers by the measured rewards, and return what to log of each constraint.

        Raises TrainingError for a value that is missing or not finite.
        """
        missing = [c.reward for c in self.constraints if c.reward not in values]
        if missing:
            raise TrainingError(f"no value was measured of the constrained reward {', '.join(missing)}")
        slack = torch.tensor([c.slack(values[c.reward]) for c in self.constraints], dtype=torch.float64)
        if not slack.isfinite().all():
            raise TrainingError(f"the constrained rewards are not finite: {values}")
        self.updates += 1
        if self.updates > self.warmup:
            self._move(slack)
        return self.metrics(values)

    def _move(self, slack: torch.Tensor) -> None:
        if self.pid is not None:
            raw = self._controlled(self.pid, -slack)
        else:
            gradient = squash_slope(self.raw, self.form) * slack
            if self.max_grad_norm is not None:
                gradient = gradient * min(1.0, self.max_grad_norm / (gradient.norm().item() + 1e-6))
            self.velocity = gradient if self.velocity is None else self.momentum * self.velocity + gradient
            raw = self.raw - self.learning_rate * self.velocity
        self.raw = raw.clamp(*self.bounds)

    def _controlled(self, gains: PID, error: torch.Tensor) -> torch.Tensor:
        """The raw values that the PID controller sets at this error [N]."""
        bound = gains.integral_bound
        change = error - (error if self.last_error is None else self.last_error)
        direct = gains.kp * error + gains.kd * change
        grown = (self.integral + error).clamp(-bound, bound)
        raw = direct + gains.ki * grown
        # What is summed up at a bound, or where the squashing is flat, would have to be taken back before the
        # multiplier moves again.
        flat = (squash_slope(raw, self.form) < SATURATED * STEEPEST[self.form]) & (raw * error > 0)
        low, high = self.bounds
        beyond = ((raw > high) & (error > 0)) | ((raw < low) & (error < 0))
        self.integral = torch.where(flat | beyond, self.integral, grown)
        self.last_error = error
        return direct + gains.ki * self.integral

    def metrics(self, values: dict[str, float]) -> dict[str, float]:
        """Per constraint: value, threshold, violation, raw and squashed multiplier, applied weight, saturation."""
        squashed = squash(self.raw, self.form)
        task, weights = self.weights()
        logged = {"constraints/task_weight": task}
        for i, constraint in enumerate(self.constraints):
            numbers = {
                "value": values[constraint.reward],
                "threshold": constraint.threshold,
                "violation": constraint.violation(values[constraint.reward]),
                "raw": self.raw[i].item(),
                "multiplier": squashed[i].item(),
                "weight": weights[i],
                "saturated": float(self.at_limit(i, upper=True) or self.at_limit(i, upper=False)),
            }
            prefix = f"constraints/{constraint.reward}_{constraint.direction}"
            logged.update({f"{prefix}/{name}": number for name, number in numbers.items()})
        return logged

    def at_limit(self, i: int, *, upper: bool) -> bool:
        """Whether multiplier i can hardly rise (upper) or fall any further: at its bound, or where the squashing is
        flat."""
        raw = self.raw[i]
        if raw.item() == self.bounds[1 if upper else 0]:
            return True
        flat = squash_slope(raw, self.form).item() < SATURATED * STEEPEST[self.form]
        return flat and (raw.item() > 0) == upper

    def describe_weights(self) -> str:
        """The weights now, for a message: `task 0.12, helpfulness 1.87`."""
        task, weights = self.weights()
        pairs = zip(self.constraints, weights, strict=True)
        return ", ".join([f"task {task:.3g}", *(f"{c.reward} {weight:.3g}" for c, weight in pairs)])

    def state_dict(self) -> dict:
        return {
            "raw": self.raw,
            "velocity": self.velocity,
            "integral": self.integral,
            "last_error": self.last_error,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict) -> None:
        if len(state["raw"]) != len(self.constraints):
            raise TrainingError(
                f"the saved run has {len(state['raw'])} multipliers and this one {len(self.constraints)} constraints"
            )
        for name, value in state.items():
            setattr(self, name, value)
