"""Constrained RLHF: multipliers, mixing, heads, thresholds, and the released defects that ours does not have."""

from dataclasses import dataclass

import numpy as np
import torch

from align.objectives.constraints import Constraint
from align.objectives.nelder_mead import NelderMead
from align.objectives.policy_loss import aggregate_tokens, value_losses
from align.objectives.returns import reward_to_go
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.estimators import Estimate, Estimator
from align.trainers.on_policy.objective import policy_objective
from align.trainers.on_policy.streams import Stream, estimate_advantages, mix
from align.trainers.ppo import PPO
from align.trainers.rloo import RLOOConfig
from align.trainers.weighting.constrained import ConstrainedWeights, SatisficingPerEpisode, SatisficingWeights
from align.trainers.weighting.options import ConstraintOptions
from tests.vector_checks.registry import close, covers, t64

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
RELEASED = {"learning_rate": 0.1, "momentum": 0.1, "max_grad_norm": 0.5}


@dataclass
class AsGiven(Estimator):
    """The vectors say the advantages themselves: one token each."""

    def estimate(self, stream, ranks):
        return Estimate(stream.scores[:, None])


def weighting(thresholds, direction="at_least", form="sigmoid", kind=ConstrainedWeights, lagrangian=None, **options):
    """Of the rewards r0, r1 ...; the task is the KL alone, each stream is standardised."""
    held = [Constraint(f"r{i}", direction, threshold) for i, threshold in enumerate(thresholds)]
    names = [f"r{i}" for i in range(len(held))]
    options = ConstraintOptions(held, form, None, standardize=True, lagrangian=lagrangian or {}, **options)
    return kind(names, [1.0] * len(names), options)


def advantages(weighting, task, columns):
    """Of every stream, [B, 1, streams], by the trainer's own code."""
    one = torch.ones(len(task), 1)
    streams = [
        Stream(spec.name, scores, None, 0.0, one, one, one)
        for spec, scores in zip(weighting.streams, [task, *columns.unbind(-1)], strict=True)
    ]
    return estimate_advantages(streams, AsGiven(), weighting, Ranks())[0]


def learn(weighting, columns, lengths=None):
    """The update after a batch of rewards [B, N]; returns what is logged."""
    named = {f"r{i}": column for i, column in enumerate(columns.unbind(-1))}
    return weighting.update(named, torch.ones(len(columns)) if lengths is None else lengths)


def policy_loss(inputs, mixed):
    args = RLOOConfig(output_dir="unused", report_to="none", use_cpu=True)
    new, old = t64(inputs["new_log_prob"])[:, None], t64(inputs["old_log_prob"])[:, None]
    batch = {"completion_mask": torch.ones_like(new), "old_logps": old}
    losses, result = policy_objective(new, mixed, batch, args, kl_coefficient=0.0)
    return aggregate_tokens(losses, batch["completion_mask"], "token_mean"), result


@covers("crl_xi_ppo_minibatch")
def one_minibatch_of_xi_ppo(inputs, outputs):
    start = {"initial": inputs["raw_multipliers"], **RELEASED}
    xi = weighting(inputs["thresholds"], "equal", "tanh", lagrangian=start)
    columns, task = t64(inputs["constraint_advantages"]), t64(inputs["kl_advantages"])
    standardised = advantages(xi, task, columns)
    close(standardised[:, 0, 1:], outputs["normalised_constraint_advantages"], **FLOAT32)
    close(standardised[:, 0, 0], outputs["normalised_kl_advantages"], **FLOAT32)
    close(xi.weights()[1:], outputs["squashed_multipliers_before"], **FLOAT32)
    mixed = mix(standardised, xi)
    close(mixed[:, 0], outputs["mixed_advantages"], **FLOAT32)
    loss, result = policy_loss(inputs, mixed)
    close(loss, outputs["policy_loss"], **FLOAT32)
    close(result.ratio[:, 0], outputs["ratio"], **FLOAT32)
    values, returns = t64(inputs["values"])[:, None], t64(inputs["constraint_returns"])[:, None]  # one token each
    one = torch.ones(len(values), 1)
    heads, _ = value_losses(values[..., :-1], values[..., :-1], returns, one[..., None], clip=None)
    kl, _ = value_losses(values[..., -1], values[..., -1], t64(inputs["kl_returns"])[:, None], one, clip=None)
    close(2 * heads.mean(), outputs["constraint_value_loss"], **FLOAT32)  # theirs is the squared error, ours its half
    close(2 * kl.mean(), outputs["kl_value_loss"], **FLOAT32)
    logged = learn(xi, t64(inputs["ep_constraint_reward_togo"]))
    slack = [logged[f"constraints/{c.reward}_equal/value"] - c.threshold for c in xi.constraints]
    close(slack, outputs["constraint_violations"], **FLOAT32)
    close(xi.multipliers.raw, outputs["raw_multipliers_after"], **FLOAT32)


@covers("crl_old_kl_ineq")
def mu_ppo_of_the_paper(inputs, outputs):
    # multipliers [METEOR, intent], columns [intent, METEOR]
    thresholds = [inputs["task_threshold"], inputs["constraint_threshold"]]
    mu = weighting(thresholds, lagrangian={"initial": inputs["raw_multipliers"], **RELEASED})
    mixed = mix(advantages(mu, t64(inputs["kl_advantages"]), t64(inputs["constraint_advantages"]).flip(-1)), mu)
    close(mixed[:, 0], outputs["mixed_advantages"], **FLOAT32)
    close(policy_loss(inputs, mixed)[0], outputs["policy_loss"], **FLOAT32)
    learn(mu, t64(inputs["ep_constraint_reward_togo"]).flip(-1))
    close(mu.multipliers.raw, outputs["raw_after"], **FLOAT32)


@covers("crl_old_task_ineq")
def one_reward_under_a_constraint_on_another(inputs, outputs):
    """Maximise METEOR subject to intent >= theta, the KL inside both rewards."""
    start = {"initial": inputs["raw_multipliers"], **RELEASED}
    held = weighting([inputs["constraint_threshold"]], lagrangian=start)
    columns = t64(inputs["constraint_advantages"])
    mixed = mix(advantages(held, columns[:, 1], columns[:, :1]), held)
    close(mixed[:, 0], outputs["mixed_advantages"], **FLOAT32)
    close(policy_loss(inputs, mixed)[0], outputs["policy_loss"], **FLOAT32)
    # this early variant measures the constraint by its lambda-returns, without the KL that is inside them
    reached = t64(inputs["constraint_returns"])[:, :1] - t64(inputs["kl_returns"])[:, None]
    slack = held.constraints[0].slack(reached.mean().item())
    close(slack * held.weights()[1], outputs["multiplier_loss"], **FLOAT32)
    learn(held, reached)
    close(held.multipliers.raw, [outputs["raw_after"]], **FLOAT32)


@covers("crl_multiplier_trajectory_sigmoid")
def momentum_of_the_multipliers(inputs, outputs):
    rates = {"learning_rate": inputs["lr"], "momentum": inputs["momentum"], "max_grad_norm": inputs["grad_clip"]}
    mu = weighting(inputs["thresholds"], lagrangian={"initial": inputs["raw_init"], **rates})
    for step, expected in zip(inputs["steps"], outputs["trajectory"], strict=True):
        learn(mu, t64([step]))
        close(mu.multipliers.raw, expected["raw"], **FLOAT32)
        close(mu.weights()[1:], expected["squashed"], **FLOAT32)


@covers("crl_unsquashed_bug")
def every_constraint_has_its_own_multiplier(outputs):
    """Released without squashing: the second multiplier weighs both constraints, and three constraints crash."""
    task, columns = t64([-0.1, 0.3, 0.0, -0.4]), t64([[1.0, 0.2], [-1.0, 0.1], [0.5, -0.3], [0.0, 0.4]])
    raw = torch.logit(t64([0.5, 0.25])).tolist()  # multipliers 0.5 and 0.25
    mu = weighting([0.0, 0.0], lagrangian={"initial": raw})
    streams = advantages(mu, task, columns)[:, 0]
    close(mix(streams, mu), 1.25 * streams[:, 0] + 0.5 * streams[:, 1] + 0.25 * streams[:, 2])
    released = streams[:, 0] + 0.25 * streams[:, 1] + 0.25 * streams[:, 2]
    close(released, outputs["cases"][0]["mixed_advantages"], **FLOAT32)
    assert (streams[:, 0] + 0.5 * streams[:, 1] + 0.25 * streams[:, 2] - released).abs().max() > 0.1
    three = weighting([0.0] * 3, lagrangian={"initial": [*raw, -2.0]})
    mixed = mix(advantages(three, task, torch.cat([columns, columns[:, :1]], dim=1)), three)[:, 0]
    squashed = torch.sigmoid(t64(-2.0))
    weights = t64([3 - 0.75 - squashed, 0.5 + squashed, 0.25])
    close(mixed, streams @ weights)


@covers("crl_multihead_gae")
def gae_with_heads(inputs, outputs):
    starts = np.flatnonzero(inputs["episode_starts"]).tolist() + [len(inputs["kl_rewards"])]
    episodes = list(zip(starts, starts[1:], strict=False))
    lengths = torch.tensor([b - a for a, b in episodes])

    def padded(column):
        return torch.nn.utils.rnn.pad_sequence([t64(column)[a:b] for a, b in episodes], batch_first=True)

    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).double()
    estimator = PPO(gamma=inputs["gamma"], lam=inputs["gae_lambda"], whiten_advantages=False)
    zero, kl = torch.zeros_like(mask), padded(inputs["kl_rewards"])
    columns, values = np.array(inputs["constraint_rewards"]), np.array(inputs["constraint_values"])
    heads = range(columns.shape[1])
    scores = {f"r{i}": padded(columns[:, i]).sum(-1) for i in heads}
    streams = [Stream(f"r{i}", scores[f"r{i}"], None, 0.0, zero, zero, mask, padded(values[:, i])) for i in heads]
    # the KL in a stream of its own: beta 1, and log-ratios that are its rewards' negatives
    streams.append(Stream("task", torch.zeros(len(episodes)).double(), None, 1.0, -kl, zero, mask))
    streams[-1].values = padded(inputs["kl_values"])
    for i, stream in enumerate(streams):
        found = estimator.estimate(stream, Ranks())
        own = i < columns.shape[1]
        for key, result in (("advantages", found.advantages), ("returns", found.returns)):
            expected = np.array(outputs[f"constraint_{key}"])[:, i] if own else outputs[f"kl_{key}"]
            close(result, padded(expected), **FLOAT32)
        to_go = np.array(outputs["ep_constraint_reward_togo"])[:, i] if own else outputs["ep_kl_reward_togo"]
        close(reward_to_go(padded(columns[:, i]) if own else kl, mask), padded(to_go), **FLOAT32)
    # what the released update compares with the threshold: the mean over tokens of the reward-to-go
    measured = torch.stack(list(scores.values()), dim=-1)
    to_go = t64(outputs["ep_constraint_reward_togo"])
    for kind, expected in (("token_mean", to_go.mean(0)), ("episode_mean", measured.mean(0))):
        logged = learn(weighting([0.0] * len(scores), estimator=kind), measured, lengths)
        close([logged[f"constraints/r{i}_at_least/value"] for i in heads], expected, **FLOAT32)


@covers("crl_composite_reward")
def rewards_are_of_their_own_episode(inputs, outputs):
    """Released: METEOR of the i-th finished episode is the running mean over the episodes before it too."""
    meteor = t64([inputs["per_text_meteor"].get(text, 0.0) for text in inputs["texts"]]) * t64(inputs["done"])
    intent = t64([inputs["per_text_intent"].get(text, 0.0) for text in inputs["texts"]]) * t64(inputs["done"])
    close(meteor, outputs["meteor_correct"])
    close(0.5 * meteor + intent, outputs["ppo_reward_correct"])
    targets, each = [inputs["meteor_target"], inputs["intent_target"]], {"kind": SatisficingPerEpisode}
    sat = weighting(targets, "equal", "squared_per_episode", coefficients=[1.0, 1.0], **each)
    scores = [sat.scores({"r0": m, "r1": i})["task"] for m, i in zip(meteor.tolist(), intent.tolist(), strict=True)]
    close(t64(scores) * t64(inputs["done"]), outputs["ppo_sat_correct"])
    assert not np.allclose(outputs["ppo_reward_as_coded"], outputs["ppo_reward_correct"])


@covers("crl_sat_bernoulli_pitfall")
def sat_on_the_batch_mean_aims_at_the_threshold(inputs, outputs):
    for theta, expected in zip(inputs["theta"], outputs.values(), strict=True):
        each = weighting([theta], "equal", "squared_per_episode", SatisficingPerEpisode, coefficients=[1.0])
        zero, one = (each.scores({"r0": reward})["task"] for reward in (0.0, 1.0))
        close([(1 - p) * zero + p * one for p in inputs["p"]], expected["expected"])
        close(one - zero, expected["slope"])  # of one sign for every p: theta is no optimum
        mean = weighting([theta], "equal", "squared", SatisficingWeights, coefficients=[1.0])
        applied = []
        for reached in (theta - 0.1, theta + 0.1):
            learn(mean, t64([[reached]]))
            applied.append(mean.weights()[1])
        assert applied[0] > 0 > applied[1]  # ours pulls p to theta from both sides


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
