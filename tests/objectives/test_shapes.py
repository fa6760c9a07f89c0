"""Tensors of wrong shapes are refused by every function of several tensors, one argument at a time, and not broadcast;
so is what carries a gradient that it must not have."""

import pytest
import torch

from align.errors import ConfigError, TrainingError
from align.objectives import (
    advantages,
    constraints,
    groups,
    implicit_sft,
    inpo,
    kl,
    kto,
    meta_apo,
    modpo,
    pair_logps,
    plackett_luce,
    policy_loss,
    returns,
    reward_model,
    reward_weighting,
    rollout_correction,
    selective,
    sparse_po,
    srpo,
)

B, T = 4, 6
MASK = torch.ones(B, T).long()
MASK[0, 4:] = 0
RATIOS = ("chosen", "rejected", "chosen_again", "rejected_after_chosen", "chosen_after_rejected", "rejected_again")


def rows(*names):
    return {name: torch.arange(1.0, B + 1) for name in names}


def tokens(*names):
    return {name: torch.arange(1.0, B * T + 1).view(B, T) / 7 for name in names}


PPO = {**tokens("logps", "old_logps", "advantages"), "mask": MASK}
CASES = {
    "k1": (kl.k1, tokens("logps", "ref_logps"), {}),
    "k2": (kl.k2, tokens("logps", "ref_logps"), {}),
    "k3": (kl.k3, tokens("logps", "ref_logps"), {}),
    "masked_sum": (kl.masked_sum, {**tokens("values"), "mask": MASK}, {}),
    "masked_mean": (kl.masked_mean, {**tokens("values"), "mask": MASK}, {}),
    "remax_token_weights": (
        advantages.remax_token_weights,
        {**rows("rewards", "greedy_rewards"), **tokens("logps", "ref_logps"), "mask": MASK},
        {"beta": 0.1},
    ),
    "token_rewards": (returns.token_rewards, {**rows("scores"), **tokens("log_ratios"), "mask": MASK}, {"beta": 0.1}),
    "reward_to_go": (returns.reward_to_go, {**tokens("rewards"), "mask": MASK}, {}),
    "gae": (returns.gae, {**tokens("rewards", "values"), "mask": MASK, **rows("last_values")}, {}),
    "whiten": (returns.whiten, {**tokens("values"), "mask": MASK}, {}),
    "clipped_policy_loss": (policy_loss.clipped_policy_loss, PPO, {}),
    "cispo_policy_loss": (policy_loss.cispo_policy_loss, PPO, {"high": 5.0}),
    "sapo_policy_loss": (policy_loss.sapo_policy_loss, PPO, {}),
    "vespo_policy_loss": (policy_loss.vespo_policy_loss, {**PPO, **tokens("correction")}, {}),
    "off_policy_kept": (
        policy_loss.off_policy_kept,
        {**tokens("advantages", "logps", "sampling_logps"), "mask": MASK},
        {"limit": 0.1},
    ),
    "value_losses": (policy_loss.value_losses, {**tokens("values", "old_values", "returns"), "mask": MASK}, {}),
    "aggregate_tokens": (policy_loss.aggregate_tokens, {**tokens("losses"), "mask": MASK}, {"how": "token_mean"}),
    "pair_logps": (pair_logps.pair_logps, {**tokens("logps", "ref_logps", "kl"), "mask": MASK}, {}),
    "pair_logps, ld_alpha": (pair_logps.pair_logps, {**tokens("logps"), "mask": MASK}, {"ld_alpha": 0.5}),
    "wpo_weights": (pair_logps.wpo_weights, {**tokens("logps", "log_sum_sq_probs"), "mask": MASK}, {}),
    "PairLogps": (
        pair_logps.PairLogps,
        rows("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_length", "rejected_length", "chosen_kl"),
        {},
    ),
    "kto_losses": (kto.kto_losses, {**rows("ratios", "labels"), "reference_point": torch.tensor(0.1)}, {}),
    "modpo_rewards": (
        modpo.modpo_rewards,
        {**rows("logps", "ref_logps"), "margin_rewards": torch.ones(B, 2), "margin_weights": torch.ones(2)},
        {"weight": 0.5, "beta": 0.1},
    ),
    "modpo_loss": (modpo.modpo_loss, rows("chosen_rewards", "rejected_rewards"), {}),
    "bradley_terry_loss": (
        reward_model.bradley_terry_loss,
        rows("chosen", "rejected", "margin", "chosen_prob"),
        {},
    ),
    "score_l2": (reward_model.score_l2, rows("chosen", "rejected"), {}),
    "centering": (reward_model.centering, rows("chosen", "rejected"), {}),
    "masked_sums": (sparse_po.masked_sums, {**tokens("log_ratios", "kl", "m_u", "m_d"), "mask": MASK}, {}),
    "sparsity": (sparse_po.sparsity, {**tokens("weights"), "mask": MASK}, {}),
    "plackett_luce": (plackett_luce.plackett_luce, {**tokens("rewards"), "listed": MASK}, {}),
    "listwise_losses": (
        plackett_luce.listwise_losses,
        {**tokens("logps", "ref_logps"), "listed": MASK},
        {"beta": 0.1},
    ),
    "log_ratios": (rollout_correction.log_ratios, {**tokens("old_logps", "rollout_logps"), "mask": MASK}, {}),
    "importance_weights": (
        rollout_correction.importance_weights,
        {**tokens("log_ratio"), "mask": MASK},
        {"high": 2.0},
    ),
    "mismatch": (rollout_correction.mismatch, {**tokens("log_ratio"), "mask": MASK}, {}),
    "excess_loss": (selective.excess_loss, tokens("logps", "ref_logps"), {}),
    "implicit_reward_loss": (
        implicit_sft.implicit_reward_loss,
        rows("logps", "ref_logps", "scores"),
        {"beta": 0.1},
    ),
    "inpo_reference": (inpo.inpo_reference, rows("ref_logps", "old_logps"), {"old_share": 0.5}),
    "meta_mixture": (meta_apo.meta_mixture, rows("offline", "online", "weight"), {}),
    "leave_one_out": (groups.leave_one_out, {**tokens("scores"), "kept": MASK.bool()}, {}),
    "group_relative": (groups.group_relative, {**tokens("scores"), "kept": MASK.bool()}, {}),
    "constraint_value": (constraints.constraint_value, rows("scores", "lengths"), {"estimator": "token_mean"}),
    "sat_weights": (constraints.sat_weights, rows("values", "thresholds", "coefficients"), {}),
    "gradient_weights": (
        reward_weighting.gradient_weights,
        {**rows("weights"), "gradients": torch.ones(B, 9)},
        {},
    ),
    "RevisionRatios": (srpo.RevisionRatios, rows(*RATIOS), {}),
}


def wrong(tensor):
    """What broadcasting would take for it, and neighbours."""
    if not tensor.dim():
        return [tensor.expand(B)]
    if tensor.dim() == 1:
        return [tensor[:, None], tensor[:1], tensor[0]]
    return [tensor[:1], tensor[:, :1], tensor[0], tensor[0, 0], tensor[:-1], tensor[:, :-1]]


@pytest.mark.parametrize("name", CASES)
def test_another_shape_is_refused(name):
    function, given, options = CASES[name]
    function(**given, **options)
    for argument, tensor in given.items():
        if name == "gradient_weights" and argument == "gradients":  # of any number of parameters
            continue
        for other in wrong(tensor):
            with pytest.raises((TrainingError, ConfigError)):
                function(**{**given, argument: other}, **options)


def test_the_error_names_the_tensors():
    with pytest.raises(TrainingError, match=r"logps \[4, 6\], mask \[4, 6\], ref_logps \[4, 5\]: must have one shape"):
        pair_logps.pair_logps(**tokens("logps"), mask=MASK, ref_logps=torch.ones(B, T - 1))
    with pytest.raises(TrainingError, match=r"mask \[3, 6\]: pairs have an even number of rows"):
        pair_logps.length_weights(MASK[:3], 0.5)
    with pytest.raises(TrainingError, match=r"rewards \[4, 1\].*: must be \[4\], a number per row"):
        values = {**rows("greedy_rewards"), **tokens("logps", "ref_logps")}
        advantages.remax_token_weights(torch.ones(B, 1), mask=MASK, beta=0.1, **values)


def test_a_gradient_where_none_may_be_is_refused():
    """An earlier policy that is the one that is trained would have a ratio of 1 without gradient."""
    logps = torch.zeros(B, T, requires_grad=True)
    with pytest.raises(TrainingError, match="old_logps: carries a gradient"):
        policy_loss.clipped_policy_loss(logps, logps, torch.ones(B, T), MASK)
    with pytest.raises(TrainingError, match="ref_chosen, ref_rejected: carries a gradient"):
        pair_logps.pair_logps(logps, MASK, logps * 1)


def test_sums_of_half_precision_are_of_single_precision():
    """In bfloat16 a sum near -300 nats has steps of 2, and a margin between two of them would be one of those."""
    logps = torch.full((2, 300), -1.0, dtype=torch.bfloat16)
    logps[0, 0] = -1.5
    pairs = pair_logps.pair_logps(logps, torch.ones(2, 300))
    assert (pairs.chosen - pairs.rejected).tolist() == [-0.5]
    assert kl.masked_sum(logps, torch.ones(2, 300)).tolist() == [-300.5, -300.0]
