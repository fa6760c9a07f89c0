"""Multipliers that find the Lagrangian's saddle point, thresholds that are met, and settings that are refused."""

import math

import numpy as np
import pytest
import torch

from align.errors import ConfigError, TrainingError
from align.objectives.constraints import Constraint, applied_weights, squash, squash_slope
from align.objectives.controllers import AdaptiveKL
from align.objectives.multipliers import PID, Multipliers
from align.objectives.nelder_mead import NelderMead, random_simplex


def bandit(multipliers, steps, rewards, task, rate=0.3):
    """Exact policy gradient on a softmax bandit with the mixed reward; returns the mean reward of each column, late."""
    logits, seen = torch.zeros(len(task), dtype=torch.float64), []
    for step in range(steps):
        p = logits.softmax(-1)
        values = rewards @ p
        multipliers.update({c.reward: v.item() for c, v in zip(multipliers.constraints, values, strict=True)})
        task_weight, weights = multipliers.weights()
        mixed = task_weight * task + rewards.T @ torch.tensor(weights, dtype=torch.float64)
        logits = logits + rate * p * (mixed - (p * mixed).sum())
        if step >= steps // 2:
            seen.append(values)
    return torch.stack(seen).mean(0)


REWARDS = torch.tensor([[0.0, 0.5, 1.0, 0.2]], dtype=torch.float64)
TASK = torch.tensor([1.0, 0.6, 0.0, 0.1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("direction", "form", "threshold"),
    [("at_least", "sigmoid", 0.6), ("at_least", "softplus", 0.6), ("equal", "tanh", 0.4)],
)
def test_a_constraint_that_costs_the_task_is_met_and_not_overshot(direction, form, threshold):
    multipliers = Multipliers([Constraint("r", direction, threshold)], form, learning_rate=0.3)
    assert bandit(multipliers, 6000, REWARDS, TASK).item() == pytest.approx(threshold, abs=0.02)


def test_at_most_holds_a_reward_down():
    task = REWARDS[0]  # maximising the reward itself, which may not exceed 0.5
    multipliers = Multipliers([Constraint("r", "at_most", 0.5)], "softplus", learning_rate=0.3)
    assert bandit(multipliers, 6000, REWARDS, task).item() == pytest.approx(0.5, abs=0.02)


def test_pid_meets_the_threshold_too():
    multipliers = Multipliers(
        [Constraint("r", "at_least", 0.6)], "softplus", pid=PID(kp=2.0, ki=0.05, integral_bound=99)
    )
    assert bandit(multipliers, 4000, REWARDS, TASK).item() == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    ("direction", "form", "bounds"),
    [
        ("equal", "tanh", None),
        ("at_least", "sigmoid", None),
        ("at_least", "sigmoid", (-1.0, 1.0)),  # where the squashing is steep
        ("at_least", "softplus", (-1.0, 2.0)),
    ],
)
def test_a_controller_does_not_wind_up(direction, form, bounds):
    """A threshold that was out of reach for long is left as soon as it is passed."""
    multipliers = Multipliers([Constraint("r", direction, 1.0)], form, pid=PID(kp=2.0, ki=0.5), bounds=bounds)
    for _ in range(200):
        held = multipliers.update({"r": 0.5})
    assert held[f"constraints/r_{direction}/multiplier"] > (0.9 if form != "sigmoid" or bounds is None else 0.7)
    raw = [multipliers.update({"r": 1.5})[f"constraints/r_{direction}/raw"] for _ in range(8)]
    assert raw[-1] < 0  # by the sum of 200 errors it would take more than 20 updates


def test_a_satisfied_inequality_loses_its_weight_and_an_equality_turns_negative():
    above = {"r": 2.0}
    inequality = Multipliers([Constraint("r", "at_least", 1.0)], "sigmoid")
    equality = Multipliers([Constraint("r", "equal", 1.0)], "tanh")
    for _ in range(200):
        first, second = inequality.update(above), equality.update(above)
    assert 0 < first["constraints/r_at_least/weight"] < 0.1 and second["constraints/r_equal/weight"] < -0.9
    assert first["constraints/r_at_least/violation"] == 0 and second["constraints/r_equal/violation"] == 1
    assert second["constraints/r_equal/saturated"] == 1
    assert second["constraints/task_weight"] == pytest.approx(1 - second["constraints/r_equal/multiplier"])


def test_weights_sum_to_the_number_of_constraints():
    constraints = [Constraint("a", "at_least", 0.0), Constraint("b", "at_least", 0.0)]
    task, weights = applied_weights(torch.tensor([0.3, -2.0]), "sigmoid", constraints)
    assert (task + weights.sum()).item() == pytest.approx(2)
    for form in ("sigmoid", "tanh", "softplus"):
        raw = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
        squash(raw, form).sum().backward()
        assert torch.allclose(raw.grad, squash_slope(raw.detach(), form))


def test_state_goes_on_where_it_was():
    values = [{"r": 0.1 * i} for i in range(8)]

    def make():
        return Multipliers([Constraint("r", "at_least", 0.5)], "sigmoid", warmup=2)

    whole = make()
    trace = [whole.update(value)["constraints/r_at_least/raw"] for value in values]
    assert trace[0] == trace[1] == 0 and trace[2] != 0  # warm-up
    first, second = make(), make()
    for value in values[:4]:
        first.update(value)
    second.load_state_dict(first.state_dict())
    assert [second.update(value)["constraints/r_at_least/raw"] for value in values[4:]] == trace[4:]


def test_what_cannot_work_is_refused():
    at_least, equal = Constraint("r", "at_least", 0.5), Constraint("r", "equal", 0.5)
    for constraints, form, message in (
        ([], "sigmoid", "no constraint"),
        ([equal], "sigmoid", "does not fit r"),
        ([at_least], "tanh", "does not fit r"),
        ([at_least, Constraint("r", "at_least", 0.7)], "sigmoid", "constrained twice"),
        ([at_least, Constraint("r", "at_most", 0.4)], "softplus", "no value of r is at least 0.5 and at most 0.4"),
        ([at_least, Constraint("s", "equal", 0.4)], "sigmoid", "do not go together .* Write an equality as a band"),
    ):
        with pytest.raises(ConfigError, match=message):
            Multipliers(constraints, form)
    band = Multipliers([at_least, Constraint("r", "at_most", 0.7)], "sigmoid")  # a band is two constraints
    assert set(band.metrics({"r": 0.6})) >= {"constraints/r_at_least/value", "constraints/r_at_most/value"}
    with pytest.raises(ConfigError, match="threshold is nan"):
        Constraint("r", "at_least", math.nan)
    with pytest.raises(ConfigError, match="none of"):
        Constraint("r", "above", 0.1)
    with pytest.raises(TrainingError, match="no value was measured of the constrained reward r"):
        Multipliers([at_least], "sigmoid").update({"other": 1.0})
    with pytest.raises(TrainingError, match="not finite"):
        Multipliers([at_least], "sigmoid").update({"r": math.inf})


def test_adaptive_kl_holds_a_plant_at_its_target():
    controller, kl = AdaptiveKL(0.01, target=5.0, horizon=100), 0.0
    for _ in range(3000):
        kl = 1 / (0.05 + controller.update(kl, 10))  # the stronger the penalty, the smaller the KL
    assert kl == pytest.approx(5.0, rel=0.02)
    with pytest.raises(TrainingError, match="not a number"):
        controller.update(math.nan, 10)
    with pytest.raises(ConfigError, match="above 0"):
        AdaptiveKL(0.1, target=0.0)


def surface(point):
    return 1 - 3 * (point["helpful"] - 0.4) ** 2 - 2 * (point["short"] + 1.5) ** 2


def search(budget=60, tell=10**9, state=None, tolerance=1e-6):
    rng = np.random.default_rng(0)
    simplex = random_simplex({"helpful": 0.0, "short": -3.0}, {"helpful": 1.0, "short": -1.0}, rng)
    nelder_mead = NelderMead(simplex, budget=budget, tolerance=tolerance, cache_tolerance=None)
    if state is not None:
        nelder_mead.load_state_dict(state)
    while len(nelder_mead.history) < tell and (point := nelder_mead.ask()) is not None:
        nelder_mead.tell(point, surface(point))
    return nelder_mead


def test_the_search_finds_the_maximum():
    point, score = search().best
    assert point["helpful"] == pytest.approx(0.4, abs=0.02) and point["short"] == pytest.approx(-1.5, abs=0.02)
    assert score == pytest.approx(1, abs=1e-3)


def test_the_search_keeps_its_budget_and_resumes():
    assert len(search(budget=7).history) == 7
    resumed = search(state=search(tell=9).state_dict())
    assert resumed.history == search().history


def test_a_point_near_an_earlier_one_is_not_evaluated_again():
    rng = np.random.default_rng(0)
    simplex = random_simplex({"helpful": 0.0, "short": -3.0}, {"helpful": 1.0, "short": -1.0}, rng)
    cached = NelderMead(simplex, budget=60, tolerance=1e-6, cache_tolerance={"helpful": 0.05, "short": 0.1})
    while (point := cached.ask()) is not None:
        for earlier, _ in cached.history:
            assert abs(earlier["helpful"] - point["helpful"]) > 0.05 or abs(earlier["short"] - point["short"]) > 0.1
        cached.tell(point, surface(point))
    assert len(cached.history) < len(search().history)


def test_an_expansion_is_kept_if_it_beats_the_best_vertex():
    """And not only if it beats the reflection, as in the released code: 3 is kept beside 1, and mirrored at 5."""
    scores = {0.0: 0.0, 1.0: 1.0, 2.0: 3.0, 3.0: 2.0}
    search = NelderMead([{"a": 0.0}, {"a": 1.0}], budget=9, cache_tolerance=None)
    asked = []
    while (point := search.ask()) is not None and point["a"] in scores:
        asked.append(point["a"])
        search.tell(point, scores[point["a"]])
    assert asked == [0.0, 1.0, 2.0, 3.0] and point == {"a": 5.0}


def test_the_search_refuses_what_it_cannot_use():
    simplex = [{"a": 0.0}, {"a": 1.0}]
    with pytest.raises(ConfigError, match="simplex of 2 points"):
        NelderMead(simplex[:1], budget=5)
    with pytest.raises(ConfigError, match="less than the simplex"):
        NelderMead(simplex, budget=1)
    nelder_mead = NelderMead(simplex, budget=5)
    with pytest.raises(ConfigError, match="cannot rank"):
        nelder_mead.tell({"a": 0.0}, math.nan)
    with pytest.raises(ConfigError, match="dimensions"):
        nelder_mead.tell({"b": 0.0}, 1.0)
    with pytest.raises(ConfigError, match="two different values"):
        random_simplex({"a": 0.0}, {"a": 0.0}, np.random.default_rng(0))


@pytest.mark.parametrize(("norm", "moved"), [(0.5, (-0.03, -0.04)), (None, (-0.075, -0.1)), (2.0, (-0.075, -0.1))])
def test_the_gradient_of_all_multipliers_is_clipped_together(norm, moved):
    """Slacks of 3 and 4 at the sigmoid's slope of 1/4: a gradient of (0.75, 1), whose norm is 1.25."""
    held = [Constraint("a", "at_least", 0.0), Constraint("b", "at_least", 0.0)]
    multipliers = Multipliers(held, "sigmoid", learning_rate=0.1, max_grad_norm=norm)
    multipliers.update({"a": 3.0, "b": 4.0})
    assert multipliers.raw.tolist() == pytest.approx(moved, rel=1e-5)


def test_initial_is_one_value_or_one_for_each_constraint():
    held = [Constraint("a", "at_least", 0.0), Constraint("b", "at_least", 0.0)]
    assert Multipliers(held, "sigmoid", initial=[0.5, -0.5]).raw.tolist() == [0.5, -0.5]
    with pytest.raises(ConfigError, match="initial has 3 raw values for 2 constraints"):
        Multipliers(held, "sigmoid", initial=[0.0, 1.0, 2.0])
    with pytest.raises(ConfigError, match=r"outside the bounds \[-6.0, 6.0\]: \[7.0\]"):  # it was moved in silence
        Multipliers(held, "sigmoid", initial=[7.0, 1.0])
    assert Multipliers(held, "sigmoid", bounds=(1.0, 2.0)).raw.tolist() == [1.0, 1.0]
