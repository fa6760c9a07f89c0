"""Losses of preference pairs: values, gradients and logged rewards of the authors' code and of TRL."""

import torch
from torch.nn.functional import logsigmoid

from align.modeling.token_values import Head, token_values
from align.objectives.beta_dpo import (
    BetaDPOState,
    BetaDraw,
    RunningMoments,
    beta_dpo,
    dynamic_beta,
    log_sampling_weights,
)
from align.objectives.dpo import sigmoid
from align.objectives.meta_apo import meta_mixture, meta_weight
from align.objectives.pair_logps import PairLogps, pair_logps, wpo_weights
from align.objectives.preference import LOSSES
from align.objectives.preference_objective import preference_objective
from align.objectives.reference_free import log_odds
from align.objectives.reward_weighting import hypervolume, hypervolume_gain, hypervolume_multiplier
from align.objectives.tdpo import tdpo_rewards
from tests.vector_checks.registry import close, covers, t64

TRL_NAMES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_ls aot_unpaired apo_zero apo_down discopop "
    "sft sigmoid_norm sigmoid_norm_beta5 rpo_mix wpo ld_dpo fdiv_forward_kl fdiv_js"
).split()


def exact(actual, expected):
    close(torch.as_tensor(actual, dtype=torch.float64).detach(), expected, rtol=1e-9, atol=1e-12)


def leaf(values):
    return t64(values).requires_grad_()


def pairs_of(inputs, prefix="policy_", reference="reference_"):
    """Pairs whose policy log-probs are leaves; no reference in the inputs: none in the pairs."""
    chosen, rejected = (leaf(inputs[f"{prefix}{side}_logps"]) for side in ("chosen", "rejected"))
    refs = [
        t64(inputs[f"{reference}{side}_logps"])
        for side in ("chosen", "rejected")
        if f"{reference}{side}_logps" in inputs
    ]
    return PairLogps(chosen, rejected, *(refs or (None, None)), torch.ones_like(chosen), torch.ones_like(chosen))


def check_gradients(total, pairs, grads, label="d(sum_loss)/d({}_logps)", names=("policy_chosen", "policy_rejected")):
    total.backward()
    for tensor, name in zip((pairs.chosen, pairs.rejected), names, strict=True):
        exact(tensor.grad, grads[label.format(name)])


def check_rewards(rewards, outputs):
    exact(rewards[0], outputs["chosen_rewards"])
    exact(rewards[1], outputs["rejected_rewards"])


@covers("dpo_21", "dpo_22", "dpo_23", "dpo_24")
def dpo_repository(inputs, params, outputs, grads):
    """Plain DPO, cDPO, IPO on sums, and DPO without a reference (which is CPO without its likelihood term)."""
    pairs = pairs_of(inputs)
    given = {"beta": params["beta"]}
    name = "sigmoid"
    if "label_smoothing" in params:
        name, given["label_smoothing"] = "cdpo", params["label_smoothing"]
    elif params.get("ipo"):
        name = "ipo_sum"
    elif params.get("reference_free"):
        name, given["cpo_alpha"] = "cpo", 0.0
        exact(LOSSES["cpo"].rewards(pairs, beta=params["beta"])[0], outputs["chosen_rewards"])
    objective = preference_objective(name, None, given)
    losses = objective(pairs).losses
    exact(losses, outputs["losses"])
    exact(losses.mean(), outputs["mean_loss"])
    check_rewards(objective(pairs).rewards, outputs)
    check_gradients(losses.sum(), pairs, grads)


def tdpo_objective(params):
    name = "tdpo2" if params["if_tdpo2"] else "tdpo1"
    alpha = {"tdpo_alpha": params["alpha"]} if params["if_tdpo2"] else {}
    return preference_objective(name, None, {"beta": params["beta"], **alpha})


@covers("tdpo_31", "tdpo_32", "tdpo_33", "tdpo_34")
def tdpo_from_logits(inputs, params, outputs, grads):
    """From logits, with the functions that train: by tiles of the vocabulary, and by chunks of tokens."""
    vocabulary = len(inputs["policy_logits"][0][0])
    for weight in (torch.eye(vocabulary, dtype=torch.float64), None):
        head = Head(torch.nn.Identity(), vocabulary, weight=weight)
        check_tdpo(head, inputs, params, outputs, grads)


def check_tdpo(head, inputs, params, outputs, grads):
    logits, ref_logits = leaf(inputs["policy_logits"]), t64(inputs["reference_logits"])
    labels = torch.tensor(inputs["labels"])[:, 1:]
    mask = labels != -100
    hidden, ref_hidden = logits[:, :-1][mask], ref_logits[:, :-1][mask]
    values = token_values(head, hidden, labels[mask], reference=(head, ref_hidden), chunk_size=4)
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    logps, ref_logps, kl = (zeros.masked_scatter(mask, x) for x in (values.logps, values.ref_logps, values.kl))
    objective = tdpo_objective(params)
    pairs = objective.pairs(logps, mask, ref_logps, kl)
    exact(torch.cat([pairs.chosen, pairs.rejected]), outputs["logps"])
    exact(torch.cat([pairs.chosen_ratio, pairs.rejected_ratio]), outputs["logps_margin"])
    exact(torch.cat([pairs.chosen_kl, pairs.rejected_kl]), outputs["position_kl"])
    losses = objective(pairs).losses
    exact(losses, outputs["losses"])
    exact(losses.mean(), outputs["mean_loss"])
    check_rewards(objective(pairs).rewards, outputs)
    losses.sum().backward()
    exact(logits.grad, grads["d(sum_loss)/d(policy_logits)"])


@covers("tdpo_scalar_35", "tdpo_scalar_36")
def tdpo_from_sums(inputs, params, outputs, grads):
    tensors = {name: leaf(values) for name, values in inputs.items()}
    ratios, kls = (
        [tensors[f"{side}_{of}"] for side in ("chosen", "rejected")] for of in ("logps_margin", "position_kl")
    )
    zeros = torch.zeros_like(ratios[0])
    pairs = PairLogps(*ratios, zeros, zeros, zeros + 1, zeros + 1, chosen_kl=kls[0], rejected_kl=kls[1])
    losses = tdpo_objective(params)(pairs).losses
    exact(losses, outputs["losses"])
    check_rewards(tdpo_rewards(pairs, beta=params["beta"]), outputs)
    losses.sum().backward()
    for name, tensor in tensors.items():
        exact(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, grads[f"d(sum_loss)/d({name})"])


@covers("betadpo_41", "betadpo_42", "betadpo_43", "betadpo_44", "betadpo_45")
def beta_dpo_batch(inputs, params, outputs, grads):
    pairs = pairs_of(inputs)
    gaps = pairs.delta.detach()
    exact(gaps, outputs["gap"])
    exact(log_sampling_weights(gaps, params["gap_mean"], params["gap_std"]).exp(), outputs["sampling_weight"])
    keep = t64(outputs["keep_mask"])
    beta = dynamic_beta(gaps[keep.bool()].mean(), params["gap_mean"], beta=params["beta0"], alpha=params["a"])
    exact(beta, outputs["beta_used"][0])
    everything = beta_dpo(pairs, draw=BetaDraw(beta, torch.ones_like(keep)))
    exact(everything, outputs["losses"])
    kept = beta_dpo(pairs, draw=BetaDraw(beta, keep * len(keep) / keep.sum()))
    exact(kept.mean(), outputs["train_loss_mean_over_kept"])
    check_rewards(LOSSES["beta_dpo"].rewards(pairs, beta=params["beta0"]), outputs)
    check_gradients((everything * keep).sum(), pairs, grads)
    # the released drawing, from the same random numbers
    state = BetaDPOState(
        beta=params["beta0"],
        beta_dpo_alpha=params["a"],
        beta_dpo_filter=params["filter_ratio"],
        beta_dpo_preset="released",
        seed=params["torch_manual_seed"],
    )
    state.moments.sums = params["gap_mean"], params["gap_std"]
    exact(state.draw(gaps).double(), outputs["keep_mask"])


@covers("betadpo_ema_46")
def beta_dpo_running_values(inputs, params, outputs):
    """The released averages of the gaps; the authors keep those of the losses too, and do not use them."""
    of_gaps, of_losses = (RunningMoments(params["gamma"], corrected=False) for _ in range(2))
    for gaps, expected in zip(inputs["gap_batches"], outputs["state_after_each_batch"], strict=True):
        of_gaps.update(t64(gaps))
        of_losses.update(-logsigmoid(params["beta"] * t64(gaps)))
        exact([of_gaps.mean, of_gaps.std, of_losses.mean, of_losses.std], expected)


@covers("metaapo_61", "metaapo_62")
def meta_apo_loss(inputs, params, outputs, grads):
    offline, online = pairs_of(inputs), pairs_of(inputs, "online_", "online_reference_")
    network = {
        "fc1_weight": torch.full((100, 1), 0.1),
        "fc1_bias": torch.zeros(100),
        "fc2_weight": torch.full((1, 100), 0.1),
        "fc2_bias": torch.zeros(1),
    }
    network = {name: leaf(value.double().mul(10).round().div(10).tolist()) for name, value in network.items()}
    weight = meta_weight(offline.delta.detach(), **network)
    exact(weight, outputs["meta_weight"])
    losses = [sigmoid(pairs, beta=params["beta"]) for pairs in (offline, online)]
    loss = meta_mixture(*losses, weight if params["train_meta"] else weight.detach()).mean()
    exact(loss, outputs["mean_loss"])
    rewards = [params["beta"] * r for pairs in (offline, online) for r in (pairs.chosen_ratio, pairs.rejected_ratio)]
    exact(torch.stack(rewards), outputs["rewards"])
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in network.items()} | {
        "policy_chosen_logps": offline.chosen.grad,
        "policy_rejected_logps": offline.rejected.grad,
        "online_chosen_logps": online.chosen.grad,
        "online_rejected_logps": online.rejected.grad,
    }
    for name, expected in grads.items():
        exact(gradients[name.removeprefix("d(mean_loss)/d(").removesuffix(")")], expected)


@covers("hypervolume_0", "hypervolume_1", "hypervolume_2", "hypervolume_3")
def hypervolume_weight(inputs, params, outputs):
    reference, *front = inputs["buffer"]
    signs = [1 if larger else -1 for larger in params["maximize"]]
    signed = [[s * x for s, x in zip(signs, p, strict=True)] for p in inputs["buffer"]]
    exact(hypervolume(signed[1:], signed[0]), outputs["hypervolume_before"])
    gain = hypervolume_gain(front, inputs["current"], reference, params["maximize"])
    exact(gain, outputs["hv_contribution"])
    exact(hypervolume_multiplier(gain), outputs["meta_reward"])


def free_pairs(inputs, names):
    """Mean log-probs as pairs of one token each."""
    chosen, rejected = (leaf(inputs[name]) for name in names)
    return PairLogps(chosen, rejected, None, None, torch.ones_like(chosen), torch.ones_like(chosen))


@covers("simpo_71", "simpo_72", "simpo_73")
def simpo(inputs, params, outputs, grads):
    names = "avg_chosen", "avg_rejected"
    pairs = free_pairs(inputs, [f"{name}_logps" for name in names])
    given = {"beta": params["beta"], "simpo_gamma": params["gamma_beta_ratio"] * params["beta"]}
    objective = preference_objective("simpo_hinge" if params["loss_type"] == "hinge" else "simpo", None, given)
    losses = objective(pairs).losses
    exact(losses, outputs["losses"])
    check_rewards(objective(pairs).rewards, outputs)
    check_gradients(losses.sum(), pairs, grads, names=names)


@covers("trl_cpo_121", "trl_cpo_122", "trl_cpo_123")
def trl_cpo(inputs, params, outputs, grads):
    names = "policy_chosen", "policy_rejected"
    pairs = free_pairs(inputs, [f"{name}_logps" for name in names])
    if params["loss_type"] == "sigmoid":
        name, given = "cpo", {"cpo_alpha": 0.0}
    elif params["alpha"] == 0:
        name, given = "simpo", {"simpo_gamma": params["simpo_gamma"]}
    else:
        name, given = "alphapo", {"simpo_gamma": params["simpo_gamma"], "alphapo_alpha": params["alpha"]}
    objective = preference_objective(name, None, {"beta": params["beta"], **given})
    losses = objective(pairs).losses
    exact(losses, outputs["losses"])
    check_rewards(objective(pairs).rewards, outputs)
    check_gradients(losses.sum(), pairs, grads, names=names)


@covers("trl_orpo_124")
def trl_orpo(inputs, params, outputs):
    chosen, rejected = (
        torch.tensor(inputs[f"avg_{side}_logps"], dtype=torch.float32) for side in ("chosen", "rejected")
    )
    ones = torch.ones_like(chosen)
    pairs = PairLogps(chosen, rejected, None, None, ones, ones)
    losses = preference_objective("orpo", None, {"beta": params["beta"]})(pairs).losses
    close(-chosen - losses, outputs["term"], rtol=1e-5, atol=1e-6)  # without the likelihood term
    difference = log_odds(chosen) - log_odds(rejected)
    close(difference.mean(), outputs["mean_log_odds"], rtol=1e-6)
    close(logsigmoid(difference).mean(), outputs["mean_logsigmoid"], rtol=1e-6)


def trl_objective(params):
    names, given = list(params["loss_types"]), {"beta": params["beta"]}
    objective_names = ["cdpo" if name == "sigmoid" and params.get("label_smoothing") else name for name in names]
    for key in ("use_weighting", "ld_alpha", "f_divergence_type"):
        given[key] = params.get(key)
    if params["label_smoothing"] and any("label_smoothing" in LOSSES[name].options for name in objective_names):
        given["label_smoothing"] = params["label_smoothing"]
    if names == ["sft"]:
        given["beta"] = None  # ours refuses what it does not use
    return preference_objective(objective_names, params["loss_weights"], given)


def check_trl(objective, inputs, outputs, grads, *, beta, dtype=torch.float64, rtol=1e-9, atol=1e-12):
    logps = torch.tensor(inputs["per_token_logps_shifted"], dtype=dtype, requires_grad=True)
    mask = torch.tensor(inputs["completion_mask"])[:, 1:]
    pairs = objective.pairs(logps, mask)
    pairs.ref_chosen, pairs.ref_rejected = (
        torch.tensor(inputs[f"ref_{side}_logps"], dtype=dtype) for side in ("chosen", "rejected")
    )
    weights = None
    if objective.use_weighting:
        weights = wpo_weights(logps, torch.tensor(inputs["log_sum_sq_probs"], dtype=dtype), mask)
    losses = objective(pairs, weights).losses
    loss = losses.mean()
    loss.backward()
    close(loss.detach(), outputs["mean_loss"], rtol=rtol, atol=atol)
    if outputs["per_pair_loss"]:
        close(losses.detach(), outputs["per_pair_loss"], rtol=rtol, atol=atol)
    # TRL sums rows that its model filled with 0 outside the completions, so its gradients go on there; ours do not
    expected = torch.tensor(grads["d(mean_loss)/d(per_token_logps_shifted)"], dtype=torch.float64) * mask
    close(logps.grad, expected, rtol=rtol, atol=atol)
    metrics = outputs["metrics"]
    chosen, rejected = LOSSES["sigmoid"].rewards(pairs, beta=beta)
    for name, value in {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": pairs.chosen.mean(),
        "logps/rejected": pairs.rejected.mean(),
    }.items():
        close(value.detach(), metrics[name], rtol=max(rtol, 1e-9), atol=max(atol, 1e-9))
    close((chosen > rejected).double().mean(), metrics["rewards/accuracies"], rtol=1e-6)


@covers(*(f"trl_{name}" for name in TRL_NAMES))
def trl_dpo(inputs, params, outputs, grads):
    check_trl(trl_objective(params), inputs, outputs, grads, beta=params["beta"])


@covers("trl_sigmoid_ls_ignored")
def trl_ignores_label_smoothing(inputs, params, outputs, grads):
    """TRL's numbers are those without label smoothing; ours refuses the option, and has cDPO under its own name."""
    check_trl(
        preference_objective("sigmoid", None, {"beta": params["beta"]}), inputs, outputs, grads, beta=params["beta"]
    )


@covers("trl_fdiv_alpha")
def trl_alpha_divergence(inputs, params, outputs, grads):
    check_trl(
        trl_objective(params), inputs, outputs, grads, beta=params["beta"], dtype=torch.float32, rtol=2e-6, atol=1e-6
    )


@covers("trl_aot_single_pair_equals_cdpo")
def aot_of_one_pair(inputs, params, outputs):
    mask = torch.tensor(inputs["completion_mask"])[:, 1:]
    pairs = pair_logps(t64(inputs["per_token_logps_shifted"]), mask)
    pairs.ref_chosen, pairs.ref_rejected = t64(inputs["ref_chosen_logps"]), t64(inputs["ref_rejected_logps"])
    for name in ("aot", "cdpo"):
        loss = preference_objective(name, None, params)(pairs).losses
        exact(loss.mean(), outputs["trl_aot"])
        exact(loss, outputs["original_cdpo"])
    assert not torch.allclose(sigmoid(pairs, beta=params["beta"]), loss)
