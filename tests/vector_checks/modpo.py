"""MODPO: losses, margins and the identities that tie it to DPO."""

import torch

from align.modeling.token_values import Head, token_values
from align.objectives.modpo import modpo_loss, modpo_rewards
from tests.vector_checks.registry import close, covers, t64


def halves(inputs, params, logps, sides=("chosen", "rejected")):
    weight, *margin_weights = params["w"]
    return [
        modpo_rewards(
            logps[side],
            t64(inputs[f"reference_{side}_logps"]),
            t64(inputs.get(f"{side}_margin_reward", [[]] * len(logps[side]))),
            weight=weight,
            margin_weights=t64(margin_weights),
            beta=params["beta"],
        )
        for side in sides
    ]


@covers(*(f"modpo_{i}" for i in range(11, 18)), "modpo_stage1_dpo_18")
def losses_and_gradients(inputs, params, outputs, grads):
    params = {"w": [1.0], **params}  # stage 1 is DPO: one objective
    logps = {side: t64(inputs[f"policy_{side}_logps"]).requires_grad_() for side in ("chosen", "rejected")}
    chosen, rejected = halves(inputs, params, logps)
    losses = modpo_loss(chosen, rejected, params["loss_type"])
    close(losses.detach(), outputs["losses"], rtol=1e-9, atol=1e-12)
    close(losses.mean().detach(), outputs.get("mean_loss", losses.mean().item()), rtol=1e-9)
    close(chosen.detach(), outputs["chosen_rewards"], rtol=1e-9, atol=1e-12)
    close(rejected.detach(), outputs["rejected_rewards"], rtol=1e-9, atol=1e-12)
    losses.sum().backward()
    if grads:
        for side in logps:
            close(logps[side].grad, grads[f"d(sum_loss)/d(policy_{side}_logps)"], rtol=1e-9, atol=1e-12)


@covers("modpo_logps_19")
def sequence_logps(inputs, params, outputs):
    """Sums over the labelled tokens, with the function that the trainer's log-probs come from."""
    logits, labels = t64(inputs["logits"])[:, :-1], torch.tensor(inputs["labels"])[:, 1:]
    wanted = labels != params["label_pad_token_id"]
    head = Head(lambda chunk: chunk, logits.shape[-1])
    values = token_values(head, logits[wanted], labels[wanted], chunk_size=2).logps
    logps = torch.zeros(wanted.shape, dtype=values.dtype).masked_scatter(wanted, values)
    close(logps.sum(-1), outputs["sum"], rtol=1e-9)
    close(logps.sum(-1) / wanted.sum(-1), outputs["mean"], rtol=1e-9)


@covers("modpo_length_penalty_bf16")
def lengths_are_not_rounded(inputs, outputs):
    """Released: the length penalty went through bfloat16. Ours keeps every length, also for a bfloat16 policy."""
    lengths = torch.tensor(inputs["lengths"], dtype=torch.float64)
    assert (-lengths).to(torch.bfloat16).tolist() == outputs["bf16"]
    zeros = torch.zeros(len(lengths))  # log-probs are summed in float32, whatever the policy's precision
    ours = modpo_rewards(zeros, zeros, -lengths[:, None], weight=1.0, margin_weights=torch.tensor([1.0]), beta=0.1)
    assert ours.tolist() == lengths.tolist()
    assert lengths.tolist() != [-value for value in outputs["bf16"]]


@covers("modpo_equals_trl_with_shifted_reference")
def a_margin_is_a_shift_of_the_reference(inputs, params, outputs):
    """MODPO is DPO at beta / w_k against log ref + w_-k . r_-k / beta."""
    mask = t64(inputs["completion_mask"])[:, 1:]
    policy = (t64(inputs["per_token_logps_shifted"]) * mask).sum(-1)
    logps = dict(zip(("chosen", "rejected"), policy.chunk(2), strict=True))
    weight, *others = params["w"]
    reference = {f"reference_{side}_logps": inputs[f"ref_{side}_logps"] for side in logps}
    loss = modpo_loss(*halves({**inputs, **reference}, params, logps))
    close(loss.mean(), outputs["modpo_mean_loss"], rtol=1e-9)
    shifted = {
        side: t64(inputs[f"ref_{side}_logps"]) + t64(inputs[f"{side}_margin_reward"]) @ t64(others) / params["beta"]
        for side in logps
    }
    for side, values in shifted.items():
        close(values, outputs[f"shifted_ref_{side}_logps"], rtol=1e-9)
    plain = [
        modpo_rewards(
            logps[side], shifted[side], torch.zeros(len(policy) // 2, 0), weight=1.0,
            margin_weights=torch.zeros(0), beta=params["beta"] / weight,
        )
        for side in logps
    ]  # fmt: skip
    close(modpo_loss(*plain).mean(), outputs["trl_mean_loss"], rtol=1e-9)
