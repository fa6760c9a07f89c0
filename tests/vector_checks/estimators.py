"""Advantages, policy and value losses, rollout correction and controllers of verl, OpenRLHF and TRL."""

import pytest
import torch

from align.errors import TrainingError
from align.objectives.controllers import AdaptiveKL
from align.objectives.groups import best_only, group_relative, leave_one_out
from align.objectives.kl import k1, masked_sum
from align.objectives.policy_loss import aggregate_tokens, clipped_policy_loss, value_losses
from align.objectives.returns import gae, reward_to_go, token_rewards, whiten
from align.objectives.rollout_correction import importance_weights, log_ratios, mismatch
from tests.vector_checks.registry import close, covers, t64

OPENRLHF = {"rtol": 1e-5, "atol": 1e-7}  # casts the KL to float32
KL_KINDS = ("nokl", "k1")


def grouped(values, n=3):
    return values.view(-1, n)


def on_tokens(scores, mask):
    """Scores [P, n] on every token of their sequences."""
    return scores.reshape(-1, 1) * mask


# ---- returns and GAE


@covers("verl_gae_g1.0_l1.0", "verl_gae_g1.0_l0.95", "verl_gae_g0.99_l0.9", "verl_gae_hole_mask")
def gae_of_verl(inputs, outputs):
    rewards, values, mask = (t64(inputs[key]) for key in ("token_level_rewards", "values", "mask"))
    advantages, returns = gae(rewards, values, mask, gamma=inputs["gamma"], lam=inputs["lam"])
    close(returns, t64(outputs["returns"]) * mask)
    close(whiten(advantages, mask), t64(outputs["advantages_whitened"]) * mask)


@covers("openrlhf_gae_g1.0_l1.0", "openrlhf_gae_g1.0_l0.95", "openrlhf_gae_g0.99_l0.9")
def gae_of_openrlhf(inputs, outputs):
    rewards, values, mask = (t64(inputs[key]) for key in ("rewards", "values", "mask"))
    advantages, returns = gae(rewards, values, mask, gamma=inputs["gamma"], lam=inputs["lam"])
    close(advantages, t64(outputs["advantages_raw"]) * mask, **OPENRLHF)
    close(returns, t64(outputs["returns"]) * mask, **OPENRLHF)


@covers("openrlhf_cumret_g1.0_l1.0", "openrlhf_cumret_g1.0_l0.95", "openrlhf_cumret_g0.99_l0.9")
def discounted_reward_to_go(inputs, outputs, common):
    rewards, mask = t64(inputs["rewards"]), t64(common["mask"])
    close(reward_to_go(rewards, mask, inputs["gamma"]), t64(outputs["returns"]) * mask, **OPENRLHF)


@covers("trl_legacy_ppo_masked_whiten")
def whitening(inputs, outputs):
    values, mask = t64(inputs["values"]), t64(inputs["mask"])
    close(whiten(values, mask), t64(outputs["shift_true"]) * mask)
    close(whiten(values, mask, shift_mean=False), t64(outputs["shift_false"]) * mask)


@covers("openrlhf_compute_reward")
def rewards_on_tokens(inputs, outputs, common):
    mask = t64(common["mask"])
    scores = t64(inputs["r"]).clamp(*inputs["clip"])
    rewards = token_rewards(scores, k1(t64(common["logp"]), t64(common["ref_logp"])), mask, beta=inputs["kl_coef"])
    close(rewards, t64(outputs["reward"]) * mask, **OPENRLHF)


# ---- groups


@covers(*(f"verl_rloo_{kl}" for kl in KL_KINDS), *(f"verl_rloo_vectorized_{kl}" for kl in KL_KINDS))
def rloo_of_verl(inputs, outputs):
    rewards, mask = t64(inputs["token_level_rewards"]), t64(inputs["mask"])
    close(on_tokens(leave_one_out(grouped(masked_sum(rewards, mask))), mask), outputs["advantages"])


@covers(*(f"verl_grpo_norm{norm}_{kl}" for norm in (True, False) for kl in KL_KINDS))
def grpo_of_verl(inputs, outputs):
    rewards, mask = t64(inputs["token_level_rewards"]), t64(inputs["mask"])
    scale = "group" if inputs["norm_adv_by_std"] else "none"
    advantages = group_relative(grouped(masked_sum(rewards, mask)), scale=scale, eps=inputs["epsilon"])
    close(on_tokens(advantages, mask), outputs["advantages"])


@covers(*(f"verl_reinforce_pp_g{gamma}_{kl}" for gamma in ("1.0", "0.9") for kl in KL_KINDS))
def reinforce_plus_plus(inputs, outputs):
    rewards, mask = t64(inputs["token_level_rewards"]), t64(inputs["mask"])
    returns = reward_to_go(rewards, mask, inputs["gamma"])
    close(returns, t64(outputs["returns"]) * mask)
    close(whiten(returns, mask), t64(outputs["advantages"]) * mask)


@covers(*(f"verl_reinforce_pp_baseline_{kl}" for kl in KL_KINDS))
def reinforce_plus_plus_with_group_baseline(inputs, outputs):
    rewards, mask = t64(inputs["token_level_rewards"]), t64(inputs["mask"])
    centred = group_relative(grouped(masked_sum(rewards, mask)), scale="none")
    close(whiten(on_tokens(centred, mask), mask), t64(outputs["advantages"]) * mask)


@covers("verl_grpo_passk_nokl")
def pass_at_k(inputs, outputs):
    rewards, mask = t64(inputs["token_level_rewards"]), t64(inputs["mask"])
    close(on_tokens(best_only(grouped(masked_sum(rewards, mask))), mask), outputs["advantages"])


@covers("verl_singleton_groups")
def a_group_of_one_is_refused(inputs, outputs):
    """verl: the raw score is the advantage of a group of one, without any baseline. Ours is an error."""
    rewards, mask = t64(inputs["token_level_rewards"]), t64(inputs["mask"])
    scores = masked_sum(rewards, mask)
    close(on_tokens(scores, mask), outputs["rloo"])
    for estimator in (leave_one_out, group_relative):
        with pytest.raises(TrainingError, match="at least 2 samples"):
            estimator(grouped(scores, 1))


@covers("trl116_grpo_advantage")
def grpo_of_trl(inputs, outputs):
    scores = grouped(t64(inputs["score"]), inputs["n"])
    for scale, expected in outputs.items():
        close(group_relative(scores, scale=scale, eps=1e-4).flatten(), expected, atol=1e-7)


@covers("trl116_rloo_advantage")
def rloo_of_trl(inputs, outputs, common):
    mask = t64(common["mask"])
    kl = masked_sum(k1(t64(common["logp"]), t64(common["ref_logp"])), mask)
    advantages = leave_one_out(grouped(t64(inputs["score"]) - inputs["beta"] * kl, inputs["n"]))
    close(advantages.flatten(), outputs["advantages"])
    close(((advantages - advantages.mean()) / (advantages.std() + 1e-4)).flatten(), outputs["normalized"])


FULL = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo")


@covers(*(f"openrlhf_full_{estimator}" for estimator in FULL))
def openrlhf_from_score_to_advantage(inputs, outputs, name, common):
    """Their order: baseline over the group, clip, then the KL on every token, reward-to-go, and for three whitening."""
    mask, estimator = t64(common["mask"]), name.removeprefix("openrlhf_full_")
    scores = grouped(t64(inputs["score"]), inputs["n_samples_per_prompt"])
    scores = {
        "rloo": leave_one_out,
        "reinforce_baseline": lambda s: group_relative(s, scale="none"),
        "dr_grpo": lambda s: group_relative(s, scale="none"),
        "group_norm": lambda s: group_relative(s, eps=1e-9),
    }.get(estimator, lambda s: s)(scores)
    scores = scores.flatten().clamp(*inputs["clip"])
    rewards = token_rewards(scores, k1(t64(common["logp"]), t64(common["ref_logp"])), mask, beta=inputs["kl_coef"])
    if estimator == "gae":
        advantages, returns = gae(rewards, t64(inputs["values"]), mask, gamma=inputs["gamma"], lam=inputs["lambd"])
    else:
        advantages = returns = reward_to_go(rewards, mask, inputs["gamma"])
    if estimator in ("gae", "reinforce", "reinforce_baseline"):
        advantages = whiten(advantages, mask, ddof=0)
    close(returns, t64(outputs["returns"]) * mask, **OPENRLHF)
    close(advantages, t64(outputs["advantages"]) * mask, **OPENRLHF)


# ---- losses

AGGREGATIONS = {
    "token-mean": ("token_mean", None),
    "seq-mean-token-sum": ("sequence_sum", None),
    "seq-mean-token-mean": ("sequence_mean", None),
    "seq-mean-token-sum-norm": ("constant", 6.0),  # verl divides by the width of the batch
}


@covers(*(f"verl_policy_loss_{name}" for name in AGGREGATIONS))
def policy_loss_of_verl(inputs, outputs, name):
    mask = t64(inputs["mask"])
    result = clipped_policy_loss(
        t64(inputs["new"]), t64(inputs["old"]), t64(inputs["adv"]), mask,
        clip_low=inputs["cliprange"], clip_high=inputs["cliprange"], dual_clip=inputs["clip_ratio_c"],
    )  # fmt: skip
    how, normalizer = AGGREGATIONS[name.removeprefix("verl_policy_loss_")]
    close(aggregate_tokens(result.losses, mask, how, normalizer), outputs["loss"])
    close(result.approx_kl, outputs["ppo_kl"])
    close(result.clipped.sum() / mask.sum(), outputs["clipfrac"])
    close(result.dual_clipped.sum() / mask.sum(), outputs["clipfrac_lower"])


@covers("verl_policy_loss_clip_higher")
def clip_higher(inputs, outputs, common):
    mask = t64(common["mask"])
    result = clipped_policy_loss(
        t64(common["new_logp"]), t64(common["logp"]), t64(common["adv"]), mask,
        clip_low=inputs["cliprange_low"], clip_high=inputs["cliprange_high"], dual_clip=3.0,
    )  # fmt: skip
    close(aggregate_tokens(result.losses, mask, "token_mean"), outputs["loss"])
    close(result.clipped.sum() / mask.sum(), outputs["clipfrac"])


@covers("verl_policy_loss_dual_clip_active")
def dual_clip(inputs, outputs, common):
    old, mask = t64(common["logp"]), t64(common["mask"])
    result = clipped_policy_loss(old + 2.0, old, -torch.ones_like(old), mask, dual_clip=inputs["clip_ratio_c"])
    close(aggregate_tokens(result.losses, mask, "token_mean"), outputs["loss"])
    close(result.dual_clipped.sum() / mask.sum(), outputs["clipfrac_lower"], rtol=1e-6)


@covers(
    "openrlhf_policy_loss_ppo",
    "openrlhf_policy_loss_dual3",
    "openrlhf_policy_loss_gspo",
    "openrlhf_policy_loss_seqmean",
)
def policy_loss_of_openrlhf(inputs, outputs):
    mask = t64(inputs["mask"])
    gspo = inputs.get("policy_loss_type") == "gspo"
    result = clipped_policy_loss(
        t64(inputs["new"]), t64(inputs["old"]), t64(inputs["adv"]), mask,
        clip_low=inputs.get("clip_eps_low", 0.2), clip_high=inputs.get("clip_eps_high", 0.2),
        dual_clip=inputs.get("dual_clip"), ratio_level="sequence_mean" if gspo else "token",
    )  # fmt: skip
    per_sequence = gspo or inputs.get("token_level_loss") is False
    close(aggregate_tokens(result.losses, mask, "sequence_mean" if per_sequence else "token_mean"), outputs["loss"])
    close(result.clipped.sum() / mask.sum(), outputs["clip_ratio"])
    close(result.approx_kl, outputs["ppo_kl"])


@covers("verl_value_loss_clip0.2", "openrlhf_value_loss")
def value_loss(inputs, outputs, name):
    verl, mask = name.startswith("verl"), t64(inputs["mask"])
    values, old = ("vpreds", "values") if verl else ("values", "old_values")
    losses, clipped = value_losses(
        t64(inputs[values]), t64(inputs[old]), t64(inputs["returns"]), mask,
        clip=inputs["cliprange_value" if verl else "clip_eps"],
    )  # fmt: skip
    close(aggregate_tokens(losses, mask, "token_mean"), outputs["loss"], rtol=1e-6)
    if verl:
        close(clipped.sum() / mask.sum(), outputs["clipfrac"])


# ---- rollout correction and controllers


def mismatched(common):
    mask = t64(common["mask"])
    return log_ratios(t64(common["logp"]), t64(common["rollout_logp"]), mask), mask


@covers(*(f"verl_tis_{level}_bn{norm}" for level in ("token", "sequence") for norm in (True, False)))
def truncated_importance_sampling(inputs, outputs, name, common):
    log_ratio, mask = mismatched(common)
    level = name.split("_")[2]
    weights = importance_weights(
        log_ratio, mask, level=level, high=inputs["threshold"], normalize=inputs["batch_normalize"]
    )
    close(weights, outputs["weights"])
    if level == "token":
        metrics = mismatch(log_ratio, mask)
        close(metrics["ratio_mean"], outputs["metrics"]["rollout_is_mean"])
        close(metrics["ratio_max"], outputs["metrics"]["rollout_is_max"])


@covers("trl116_vllm_is_ratio")
def importance_ratios_of_trl(inputs, outputs, common):
    log_ratio, mask = mismatched(common)
    for name, expected in outputs.items():
        level, outside = name.split("_")
        weights = importance_weights(log_ratio, mask, level=level, high=inputs["clip_max"], outside=outside)
        close(weights, t64(expected) * mask)  # TRL leaves 1 outside the mask


@covers("openrlhf_is_tis", "openrlhf_is_icepop")
def importance_sampling_of_openrlhf(inputs, outputs, name, common):
    log_ratio, mask = mismatched(common)
    low, high = inputs["threshold"]
    outside = "mask" if name.endswith("icepop") else "truncate"
    weights = importance_weights(log_ratio, mask, low=low, high=high, outside=outside)
    losses = clipped_policy_loss(t64(inputs["new"]), t64(inputs["old"]), t64(inputs["adv"]), mask).losses
    close(aggregate_tokens(weights * losses, mask, "token_mean"), outputs["loss"])
    close(mismatch(log_ratio, mask)["kl"], outputs["vllm_kl"])


@covers("verl_offpolicy_metrics")
def numbers_of_the_mismatch(outputs, common):
    metrics = mismatch(*mismatched(common))
    for ours, theirs in {
        "kl": "kl", "kl_k3": "k3_kl", "chi2_token": "chi2_token", "chi2_sequence": "chi2_seq"
    }.items():  # fmt: skip
        close(metrics[ours], outputs[theirs], rtol=1e-6)


@covers("verl_kl_abs")
def absolute_log_ratio(inputs, outputs):
    close(k1(t64(inputs["logp"]), t64(inputs["ref"])).abs(), outputs["kl"])


@covers("adaptive_kl_controller", "trlx_adaptive_kl")
def adaptive_kl(inputs, outputs):
    controller = AdaptiveKL(inputs["init"], inputs["target"], horizon=inputs["horizon"])
    values = [controller.update(kl, inputs["n_steps"]) for kl in inputs.get("current_kl", inputs.get("kl"))]
    close(values, outputs.get("coef_after_each", outputs.get("values")))
