"""Constrained RLHF: multipliers, mixing, heads, thresholds, and the released defects that ours does not have."""

import numpy as np
import torch

from align.evaluation.gold import range_normalised
from align.objectives.constraints import (
    Constraint,
    constraint_value,
    mix_advantages,
    sat_reward_released,
    sat_weights,
    standardize,
)
from align.objectives.multipliers import Multipliers
from align.objectives.nelder_mead import NelderMead
from align.objectives.policy_loss import aggregate_tokens, clipped_policy_loss, value_losses
from align.objectives.returns import gae, reward_to_go
from tests.vector_checks.registry import close, covers, t64

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
RELEASED = {"learning_rate": 0.1, "momentum": 0.1, "max_grad_norm": 0.5}


def held(thresholds, direction="at_least"):
    return [Constraint(f"r{i}", direction, threshold) for i, threshold in enumerate(thresholds)]


def by_name(values):
    return {f"r{i}": float(value) for i, value in enumerate(values)}


def mixed(multipliers, task, columns):
    task_weight, weights = multipliers.weights()
    return mix_advantages(standardize(task), standardize(columns), torch.tensor(task_weight), t64(weights))


def policy_loss(inputs, advantages):
    new, old = t64(inputs["new_log_prob"])[:, None], t64(inputs["old_log_prob"])[:, None]
    one = torch.ones_like(new)
    result = clipped_policy_loss(new, old, advantages[:, None], one)
    return aggregate_tokens(result.losses, one, "token_mean"), result


@covers("crl_xi_ppo_minibatch")
def one_minibatch_of_xi_ppo(inputs, outputs):
    multipliers = Multipliers(
        held(inputs["thresholds"], "equal"), "tanh", initial=inputs["raw_multipliers"], **RELEASED
    )
    columns, task = t64(inputs["constraint_advantages"]), t64(inputs["kl_advantages"])
    close(standardize(columns), outputs["normalised_constraint_advantages"], **FLOAT32)
    close(standardize(task), outputs["normalised_kl_advantages"], **FLOAT32)
    close(multipliers.weights()[1], outputs["squashed_multipliers_before"], **FLOAT32)
    advantages = mixed(multipliers, task, columns)
    close(advantages, outputs["mixed_advantages"], **FLOAT32)
    loss, result = policy_loss(inputs, advantages)
    close(loss, outputs["policy_loss"], **FLOAT32)
    close(result.ratio[:, 0], outputs["ratio"], **FLOAT32)
    values = t64(inputs["values"])
    one = torch.ones(len(values), 1)
    heads, _ = value_losses(values[:, :-1], values[:, :-1], t64(inputs["constraint_returns"]), one, clip=None)
    kl, _ = value_losses(values[:, -1:], values[:, -1:], t64(inputs["kl_returns"])[:, None], one, clip=None)
    close(2 * heads.mean(), outputs["constraint_value_loss"], **FLOAT32)  # theirs is the squared error, ours its half
    close(2 * kl.mean(), outputs["kl_value_loss"], **FLOAT32)
    reached = t64(inputs["ep_constraint_reward_togo"]).mean(0)
    slack = [c.slack(v) for c, v in zip(multipliers.constraints, reached.tolist(), strict=True)]
    close(slack, outputs["constraint_violations"], **FLOAT32)
    multipliers.update(by_name(reached))
    close(multipliers.raw, outputs["raw_multipliers_after"], **FLOAT32)


@covers("crl_old_kl_ineq")
def mu_ppo_of_the_paper(inputs, outputs):
    # multipliers [METEOR, intent], columns [intent, METEOR]
    thresholds = [inputs["task_threshold"], inputs["constraint_threshold"]]
    multipliers = Multipliers(held(thresholds), "sigmoid", initial=inputs["raw_multipliers"], **RELEASED)
    columns = t64(inputs["constraint_advantages"]).flip(-1)
    advantages = mixed(multipliers, t64(inputs["kl_advantages"]), columns)
    close(advantages, outputs["mixed_advantages"], **FLOAT32)
    close(policy_loss(inputs, advantages)[0], outputs["policy_loss"], **FLOAT32)
    multipliers.update(by_name(t64(inputs["ep_constraint_reward_togo"]).flip(-1).mean(0)))
    close(multipliers.raw, outputs["raw_after"], **FLOAT32)


@covers("crl_old_task_ineq")
def one_reward_under_a_constraint_on_another(inputs, outputs):
    """Maximise METEOR subject to intent >= theta, the KL inside both rewards."""
    constraint = held([inputs["constraint_threshold"]])
    multipliers = Multipliers(constraint, "sigmoid", initial=inputs["raw_multipliers"], **RELEASED)
    columns = t64(inputs["constraint_advantages"])
    advantages = mixed(multipliers, columns[:, 1], columns[:, :1])
    close(advantages, outputs["mixed_advantages"], **FLOAT32)
    close(policy_loss(inputs, advantages)[0], outputs["policy_loss"], **FLOAT32)
    # this early variant measures the constraint by its lambda-returns, without the KL that is inside them
    reached = (t64(inputs["constraint_returns"])[:, 0] - t64(inputs["kl_returns"])).mean()
    slack = multipliers.constraints[0].slack(reached.item())
    close(slack * multipliers.weights()[1][0], outputs["multiplier_loss"], **FLOAT32)
    multipliers.update(by_name([reached]))
    close(multipliers.raw, [outputs["raw_after"]], **FLOAT32)


@covers("crl_multiplier_trajectory_sigmoid")
def momentum_of_the_multipliers(inputs, outputs):
    multipliers = Multipliers(
        held(inputs["thresholds"]), "sigmoid", initial=inputs["raw_init"], learning_rate=inputs["lr"],
        momentum=inputs["momentum"], max_grad_norm=inputs["grad_clip"],
    )  # fmt: skip
    for step, expected in zip(inputs["steps"], outputs["trajectory"], strict=True):
        multipliers.update(by_name(step))
        close(multipliers.raw, expected["raw"], **FLOAT32)
        close(multipliers.weights()[1], expected["squashed"], **FLOAT32)


@covers("crl_unsquashed_bug")
def every_constraint_has_its_own_multiplier(outputs):
    """Released without squashing: the second multiplier weighs both constraints, and three constraints crash."""
    task, columns = t64([-0.1, 0.3, 0.0, -0.4]), t64([[1.0, 0.2], [-1.0, 0.1], [0.5, -0.3], [0.0, 0.4]])
    weights = t64([0.5, 0.25])
    ours = mix_advantages(standardize(task), standardize(columns), torch.tensor(1.0), weights)
    close(ours, standardize(task) + 0.5 * standardize(columns)[:, 0] + 0.25 * standardize(columns)[:, 1])
    released = mix_advantages(standardize(task), standardize(columns), torch.tensor(1.0), t64([0.25, 0.25]))
    close(released, outputs["cases"][0]["mixed_advantages"], **FLOAT32)
    assert (ours - released).abs().max() > 0.1
    third = torch.cat([columns, columns[:, :1]], dim=1)
    three = mix_advantages(task, third, torch.tensor(1.0), t64([0.5, 0.25, 0.1]))
    close(three, task + 0.6 * columns[:, 0] + 0.25 * columns[:, 1])


@covers("crl_multihead_gae")
def gae_with_heads(inputs, outputs):
    starts = np.flatnonzero(inputs["episode_starts"]).tolist() + [len(inputs["kl_rewards"])]
    width = max(b - a for a, b in zip(starts, starts[1:], strict=False))
    columns = torch.cat([t64(inputs["constraint_rewards"]), t64(inputs["kl_rewards"])[:, None]], dim=-1)
    values = torch.cat([t64(inputs["constraint_values"]), t64(inputs["kl_values"])[:, None]], dim=-1)
    expected = {
        key: torch.cat([t64(outputs[f"constraint_{key}"]), t64(outputs[f"kl_{key}"])[:, None]], dim=-1)
        for key in ("advantages", "returns")
    }
    to_go = torch.cat([t64(outputs["ep_constraint_reward_togo"]), t64(outputs["ep_kl_reward_togo"])[:, None]], dim=-1)
    for a, b in zip(starts, starts[1:], strict=False):
        pad = torch.nn.functional.pad
        mask = pad(torch.ones(1, b - a), (0, width - (b - a)))
        rewards, old = (pad(x[None, a:b], (0, 0, 0, width - (b - a))) for x in (columns, values))
        advantages, returns = gae(rewards, old, mask, gamma=inputs["gamma"], lam=inputs["gae_lambda"])
        close(advantages[0, : b - a], expected["advantages"][a:b], **FLOAT32)
        close(returns[0, : b - a], expected["returns"][a:b], **FLOAT32)
        for head in range(columns.shape[1]):
            close(reward_to_go(rewards[..., head], mask)[0, : b - a], to_go[a:b, head], **FLOAT32)
        # what the released update compares with the threshold: the mean over tokens of the reward-to-go
    lengths = torch.tensor([b - a for a, b in zip(starts, starts[1:], strict=False)])
    scores = t64([to_go[a, 0] for a in starts[:-1]])
    close(constraint_value(scores, lengths, "token_mean"), to_go[:, 0].mean(), **FLOAT32)
    close(constraint_value(scores, lengths, "episode_mean"), scores.mean())


@covers("crl_composite_reward")
def rewards_are_of_their_own_episode(inputs, outputs):
    """Released: METEOR of the i-th finished episode is the running mean over the episodes before it too."""
    meteor = t64([inputs["per_text_meteor"].get(text, 0.0) for text in inputs["texts"]]) * t64(inputs["done"])
    intent = t64([inputs["per_text_intent"].get(text, 0.0) for text in inputs["texts"]]) * t64(inputs["done"])
    close(meteor, outputs["meteor_correct"])
    close(0.5 * meteor + intent, outputs["ppo_reward_correct"])
    columns = torch.stack([meteor, intent], dim=-1)
    sat = sat_reward_released(columns, t64([inputs["meteor_target"], inputs["intent_target"]]), t64([1.0, 1.0]))
    close(sat * t64(inputs["done"]), outputs["ppo_sat_correct"])
    assert not np.allclose(outputs["ppo_reward_as_coded"], outputs["ppo_reward_correct"])


@covers("crl_sat_bernoulli_pitfall")
def sat_on_the_batch_mean_aims_at_the_threshold(inputs, outputs):
    for theta, expected in zip(inputs["theta"], outputs.values(), strict=True):
        threshold, one = t64([theta]), t64([1.0])
        zero_one = sat_reward_released(t64([[0.0], [1.0]]), threshold, one)
        released = [(1 - p) * zero_one[0] + p * zero_one[1] for p in inputs["p"]]
        close(released, expected["expected"])
        close(zero_one[1] - zero_one[0], expected["slope"])  # of one sign for every p: theta is no optimum
        below, above = (sat_weights(t64([theta + d]), threshold, one).item() for d in (-0.1, 0.1))
        assert below > 0 > above  # ours pulls p to theta from both sides


@covers("crl_eval_score")
def evaluation_score(inputs, outputs):
    names = {
        "bleu": "bleu", "sacrebleu": "sacrebleu", "rouge2": "rouge2", "unique_3": "unique_3",
        "vocab_size_3_nopunct": "vocab_size_3", "max_pred_length_nopunct": "max_pred_length",
    }  # fmt: skip
    values = {ours: inputs[theirs] for theirs, ours in names.items()}
    groups = [["sacrebleu", "rouge2", "bleu"], ["unique_3", "vocab_size_3", "max_pred_length"]]
    close(range_normalised(values, inputs["ranges"], groups), outputs["eval_score"])


@covers("crl_nelder_mead_seed0_iters100")
def threshold_search(inputs, outputs):
    rng = np.random.RandomState(inputs["np_random_seed"])
    ranges = inputs["init"]
    draws = rng.rand(3, 2)
    simplex = [
        {name: low + u * (high - low) for (name, (low, high)), u in zip(ranges.items(), row, strict=True)}
        for row in draws
    ]
    search = NelderMead(
        simplex, budget=inputs["n_iters"] // inputs["cost_per_eval"], tolerance=inputs["tol"], reflect=inputs["alpha"],
        expand=inputs["gamma"], contract=inputs["rho"], shrink=inputs["sigma"],
    )  # fmt: skip
    for expected, loss in outputs["evaluated_points_in_order"]:
        point = search.ask()
        close([point["meteor"], point["intent"]], expected)
        score = 0.72 - 60 * (point["meteor"] - 0.23) ** 2 - 12 * (point["intent"] - 0.48) ** 2
        close(-score, loss)
        search.tell(point, score)
    assert search.ask() is None and len(search.history) == outputs["n_evaluations"]
    shown = [[[p["meteor"], p["intent"]] for p in simplex] for simplex in search.simplexes]
    for expected in outputs["logged_simplexes"]:
        assert any(np.allclose(expected, simplex, rtol=1e-9) for simplex in shown), expected


@covers("crl_nm_evaluate_thresholds")
def thresholds_cannot_be_swapped(inputs, outputs):
    """Released: the vertex [meteor, intent] goes to the constraints by position, so listing them the other way round
    swaps the thresholds. Ours are named."""
    assert outputs["cases"][1]["threshold_of"] == {"intent": 0.23, "meteor": 0.48}
    meteor, intent = inputs["vertex_meteor_intent"]
    simplex = [{"meteor": meteor, "intent": intent}, {"intent": 0.5, "meteor": 0.2}, {"intent": 0.4, "meteor": 0.25}]
    asked = NelderMead(simplex, budget=3).ask()
    for order in (["meteor", "intent"], ["intent", "meteor"]):
        assert {name: asked[name] for name in order} == outputs["cases"][0]["threshold_of"]
    measured = inputs["measured"]
    within = [abs(measured[name] / asked[name] - 1) <= 0.05 for name in asked]
    assert sum(within) == 2 and outputs["cases"][0]["n_reached"] == 1  # one evaluation, both rewards in the band
