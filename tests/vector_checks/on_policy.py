"""ReMax, advantages and the KL estimators."""

import torch

from align.objectives import kl
from align.objectives.advantages import remax_token_weights
from align.objectives.policy_loss import aggregate_tokens
from align.objectives.returns import reward_to_go
from tests.vector_checks.registry import close, covers, t64


@covers(
    "remax_original_g0.99_kl0.05_clip5.0", "remax_original_g1.0_kl0.05_clip5.0", "remax_original_g0.99_kl0.1_clip1.0"
)
def remax_original(inputs, outputs):
    score, greedy, logp, ref, new_logp, mask = (
        t64(inputs[key]) for key in ("score", "greedy_reward", "logp", "ref", "new_logp", "mask")
    )
    weights = remax_token_weights(
        score, greedy, logp, ref, mask, beta=inputs["kl_ctl"], gamma=inputs["gamma"],
        reward_clip=inputs["clip_reward_value"], kl_mode="one_step",
    )  # fmt: skip
    close(weights, outputs["token_weights"])
    close(aggregate_tokens(-weights * new_logp, mask, "token_mean"), outputs["loss"])


@covers("verl_remax_nokl", "verl_remax_k1")
def verl_remax(inputs, outputs):
    rewards, mask, greedy = (t64(inputs[key]) for key in ("token_level_rewards", "mask", "reward_baselines"))
    close(reward_to_go(rewards, mask), outputs["returns"])
    # token rewards = a score on the last token - beta * k1 elsewhere: so split, beta = 1 gives verl's advantages
    last = mask.cumsum(-1) == mask.sum(-1, keepdim=True)
    penalty = torch.where(last & mask.bool(), torch.zeros(()), rewards)
    score = (rewards * mask).sum(-1) - (penalty * mask).sum(-1)
    advantages = remax_token_weights(
        score, greedy, -penalty, torch.zeros_like(penalty), mask, beta=1.0, kl_mode="to_go"
    )
    close(advantages, outputs["advantages"])


@covers("verl_kl_k1", "verl_kl_k2", "verl_kl_k3", "openrlhf_kl_k1", "openrlhf_kl_k2", "openrlhf_kl_k3")
def kl_values(inputs, outputs, name):
    estimator = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[name[-2:]]
    # OpenRLHF's were computed in float32, where the two log-probs cancel
    tolerance = {"rtol": 1e-5, "atol": 2e-7} if name.startswith("openrlhf") else {}
    close(estimator(t64(inputs["logp"]), t64(inputs["ref"])), outputs["kl"], **tolerance)


@covers("verl_kl_gradients")
def kl_gradients(inputs, outputs):
    for name, expected in outputs.items():
        logp = t64(inputs["logp"]).requires_grad_()
        values = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[name](logp, t64(inputs["ref"]))
        values.sum().backward()
        close(values.detach(), expected["value"])
        close(logp.grad, expected["grad"])


@covers("ens_ppo_kl_estimators")
def ppo_kl_estimators(inputs, outputs):
    logp, ref, mask = (t64(inputs[key]) for key in ("logprobs", "ref_logprobs", "mask"))
    close(kl.k1(logp, ref) * mask, outputs["log_ratio"], atol=1e-7)
    for estimator, name in ((kl.k1, "k1_sum_mean"), (kl.k2, "k2_sum_mean")):
        close(kl.masked_sum(estimator(logp, ref), mask).mean(), outputs[name], rtol=1e-5, atol=1e-7)
    # released: e^d - 1 - d, the estimator for samples from the *reference*; ours is e^-d - 1 + d, and differs
    close(kl.masked_sum(kl.k3(ref, logp), mask).mean(), outputs["k3_sum_mean"], rtol=1e-5)
    assert abs(kl.masked_sum(kl.k3(logp, ref), mask).mean() - outputs["k3_sum_mean"]) > 0.01
    response = mask.clone()
    response[:, 1] = 0  # one prompt position per sequence
    close(kl.masked_sum(kl.k2(logp, ref), response).mean(), outputs["k2_response_only"], rtol=1e-5)
    sequence_level = kl.masked_sum(kl.k1(logp, ref), mask).square().mean() / 2
    close(sequence_level, outputs["k2_sequence_level_mean"], atol=1e-12)
