"""SparsePO's loss, mask networks and MaPO's masks."""

import torch

from align.modeling.activation_masks import min_max
from align.modeling.token_masks import MaskSettings, TokenMask, standardise
from align.objectives.sparse_po import implicit_rewards, masked_sums, sparse_po_loss, sparsity
from tests.vector_checks.registry import close, covers, t64


def halves(sums, of):
    """Chosen and rejected sums of a batch of both."""
    count = len(sums.u) // 2
    rows = slice(0, count) if of == "chosen" else slice(count, None)
    return type(sums)(**{name: value[rows] for name, value in vars(sums).items()})


@covers("sparsepo_51", "sparsepo_52", "sparsepo_53", "sparsepo_54", "sparsepo_55")
def loss_of_raw_logits(inputs, outputs, params, grads):
    labels = torch.tensor(inputs["labels"])[:, 1:]
    real = labels != -100
    logits = t64(inputs["policy_logits"]).requires_grad_()
    m_u = t64(inputs["mask_u"]).requires_grad_()
    # a common mask is one tensor, and its gradient that of both terms
    m_d = t64(inputs["mask_d"]).requires_grad_() if "d(mean_loss)/d(mask_d)" in grads else m_u
    logps = logits[:, :-1].log_softmax(-1)
    ref_logps = t64(inputs["reference_logits"])[:, :-1].log_softmax(-1)
    taken = labels.clamp(min=0)[..., None]
    log_ratios = (logps - ref_logps).gather(-1, taken).squeeze(-1) * real
    everywhere = (ref_logps.exp() * (ref_logps - logps)).sum(-1)
    kl = everywhere * real
    beta = params["beta"]

    sums = masked_sums(log_ratios, kl, real, m_u, m_d)
    chosen, rejected = halves(sums, "chosen"), halves(sums, "rejected")
    losses = sparse_po_loss(chosen, rejected, beta=beta, l1_u=params["l1_norm_param_u"], l1_d=params["l1_norm_param_d"])
    losses.mean().backward()
    close(losses.mean().detach(), outputs["mean_loss"])
    close(logits.grad, grads["d(mean_loss)/d(policy_logits)"])
    close(m_u.grad, grads["d(mean_loss)/d(mask_u)"])
    if m_d is not m_u:
        close(m_d.grad, grads["d(mean_loss)/d(mask_d)"])
    if params["mask_kind"] == "ones":
        unmasked = masked_sums(log_ratios, kl, real)
        as_tdpo1 = sparse_po_loss(halves(unmasked, "chosen"), halves(unmasked, "rejected"), beta=beta)
        close(as_tdpo1.detach(), losses.detach())

    metrics = outputs["metrics"]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        rows = slice(0, 2) if name == "chosen" else slice(2, 4)
        close(side.d.mean().detach(), metrics[f"WgtSeqKL/{name}"])
        # released: the unmasked KL is summed over prompt and padding too; ours over the completion
        close(everywhere[rows].sum(-1).mean().detach(), metrics[f"SeqKL/{name}"])
        close(side.l1_u.mean().detach(), metrics[f"Weights/u_{name}_l1_norm"])
        close(side.l1_d.mean().detach(), metrics[f"Weights/d_{name}_l1_norm"])
        for weights, released in ((m_u, "rw"), (m_d, "kl")):
            share = sparsity(weights[rows], real[rows]).mean()
            close(100 * share, metrics[f"Weights/{released}_{name}_sparsity"], rtol=1e-5)
        # released: the logged rewards are beta (U - D), which is not what the sigmoid sees
        close((beta * (side.u - side.d)).mean().detach(), metrics[f"rewards/{name}"])
    margins = implicit_rewards(chosen, beta) - implicit_rewards(rejected, beta)
    without_l1 = sparse_po_loss(chosen, rejected, beta=beta)
    close(-torch.nn.functional.logsigmoid(margins).detach(), without_l1.detach())
    assert abs(margins.mean().item() - metrics["rewards/margins"]) > 1e-3


@covers("sparsepo_mask_56", "sparsepo_mask_57")
def mask_networks(inputs, outputs, params, name):
    states = list(t64(inputs["hidden_states_per_layer"]))
    layers = "all" if name == "sparsepo_mask_56" else "last"
    network = TokenMask(MaskSettings("common", params["hidden_size"], params["num_layers"], layers=layers)).double()
    network.load_state_dict(ours(inputs["state_dict"]))
    seen = [standardise(h, params["ln_eps"]) for h in states] if layers == "all" else states[-1:]
    close(network.eval()(seen).detach(), outputs["mask"])


def ours(released):
    """The released names of the weights, as ours."""
    renamed = {
        "mixer.weight": "mixer.weight",
        "layer_norm.weight": "norm.weight",
        "layer_norm.bias": "norm.bias",
        "w.weight": "first.0.weight",
        "w.bias": "first.0.bias",
    }
    for layer in range(3):
        for kind in ("weight", "bias"):
            renamed[f"w_per_layer.{layer}.w.{kind}"] = f"first.{layer}.{kind}"
    return {renamed[name]: t64(value) for name, value in released.items()}


@covers("mapo_activation_58")
def activation_mask(inputs, outputs):
    mask = min_max(t64(inputs["activation"]).mean(-1), torch.tensor(inputs["loss_mask"]))
    close(mask, outputs["mask_exact_minmax_only"])
    # released: the mean, deviation, minimum and maximum are rounded to float16 on the way
    close(mask, outputs["mask_as_released"], rtol=0, atol=2e-3)


@covers("mapo_loss_59")
def mapo_loss(inputs, outputs, params):
    mask = t64(inputs["mask"])
    log_ratios = t64(inputs["policy_token_logps"]) - t64(inputs["reference_token_logps"])
    sums = masked_sums(log_ratios, -t64(inputs["neg_position_kl"]), torch.ones_like(mask), mask, mask)
    chosen, rejected = halves(sums, "chosen"), halves(sums, "rejected")
    losses = sparse_po_loss(chosen, rejected, beta=params["beta"])
    close(losses, outputs["losses"])
    close(losses.mean(), outputs["mean_loss"])
    # released: U + D of the released sign, which is U - D
    close(params["beta"] * (chosen.u - chosen.d), outputs["chosen_rewards"])
    close(params["beta"] * (rejected.u - rejected.d), outputs["rejected_rewards"])
