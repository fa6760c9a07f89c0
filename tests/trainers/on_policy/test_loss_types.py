"""`loss_type` against the loss of TRL's GRPOTrainer, on the same log-probs."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import trl

from align.errors import ConfigError
from align.objectives.policy_loss import aggregate_tokens
from align.trainers.grpo import GRPOConfig
from align.trainers.on_policy.objective import loss_count, policy_objective
from tests.trainers.tiny_runs import on_policy_config

LENGTHS = [5, 2, 4, 1]  # the third is masked
LONGEST = 7
# TRL's bnpo is another one for every cut of the step
CASES = [(kind, n) for kind in ("grpo", "dapo", "dr_grpo", "cispo", "luspo", "sapo", "vespo") for n in (1, 2)] + [
    ("bnpo", 1)
]


def drawn():
    draw = torch.Generator().manual_seed(0)
    old, step, reference = (torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    mask = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).double()
    mask[2] = 0
    advantages = torch.tensor([1.3, -0.7, 2.0, -1.9], dtype=torch.float64)
    return {
        "old": old - 2,
        "new": old - 2 + 0.4 * step,
        "ref": old - 2 + 0.1 * reference,
        "mask": mask,
        "a": advantages,
    }


def trl_gradient(kind, level, beta, micro_batches, threshold=None, correct=False, delta=None):
    """Of TRL's own code: the loss of a step of so many micro-batches, and its gradient in the log-probs."""
    x = drawn()
    logps = x["new"].clone().requires_grad_()
    high = 1.2 if kind == "cispo" else 0.28
    alone = SimpleNamespace(num_processes=1, gather=lambda v: v, reduce=lambda v, reduction: v, sync_gradients=True)
    trainer = SimpleNamespace(
        loss_type=kind, importance_sampling_level=level, epsilon_low=0.2, epsilon_high=high, beta=beta,
        max_completion_length=LONGEST, top_entropy_quantile=1.0, off_policy_mask_threshold=threshold, use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=micro_batches, accelerator=alone,
        args=SimpleNamespace(
            delta=delta, use_bias_correction_kl=correct, steps_per_generation=micro_batches, sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        ),
        get_off_policy_mask=trl.GRPOTrainer.get_off_policy_mask, get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    total = 0.0
    for rows in torch.arange(4).chunk(micro_batches):
        trainer._get_per_token_logps_and_entropies = lambda *a, rows=rows, **k: (
            logps[rows],
            logps[rows].detach(),
            None,
        )
        ids = torch.zeros(len(rows), 5, dtype=torch.long)
        inputs = {
            "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": x["mask"][rows],
            "advantages": x["a"][rows], "old_per_token_logps": x["old"][rows], "ref_per_token_logps": x["ref"][rows],
            "num_items_in_batch": x["mask"].sum(),
        }  # fmt: skip
        total = total + trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    total.backward()
    return total.item(), logps.grad


def our_gradient(args, micro_batches):
    x = drawn()
    logps = x["new"].clone().requires_grad_()
    kept = [int(length) for length in x["mask"].sum(-1) if length]
    total = 0.0
    for rows in torch.arange(4).chunk(micro_batches):
        batch = {"completion_mask": x["mask"][rows], "old_logps": x["old"][rows], "ref_logps": x["ref"][rows]}
        advantages = x["a"][rows, None].expand(-1, 5)
        losses, _ = policy_objective(logps[rows], advantages, batch, args, kl_coefficient=args.beta)
        total = total + aggregate_tokens(
            losses, batch["completion_mask"], args.loss_aggregation, loss_count(kept, args)
        )
    total.backward()
    return total.item(), logps.grad


def upper(kind) -> dict:
    """The bound of the ratio from above, as `trl_gradient` has it; of losses without one there is nothing to say."""
    return {} if kind in ("sapo", "vespo") else {"epsilon_high": 1.2 if kind == "cispo" else 0.28}


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(("kind", "micro_batches"), CASES)
def test_the_loss_is_that_of_trl(kind, micro_batches, beta, tmp_path):
    options = {**upper(kind), "beta": beta, "max_completion_length": LONGEST}
    if kind == "luspo":
        options["importance_sampling_level"] = "sequence"
    args = on_policy_config(GRPOConfig, tmp_path, loss_type=kind, num_mini_batches=2, **options)
    theirs, their_gradient = trl_gradient(kind, "sequence" if kind == "luspo" else "token", beta, micro_batches)
    loss, gradient = our_gradient(args, micro_batches)
    if kind in ("grpo", "dr_grpo", "luspo", "sapo"):
        # TRL counts the masked sequence among those that it divides by
        theirs, their_gradient = theirs * 4 / 3, their_gradient * 4 / 3
    assert loss == pytest.approx(theirs, rel=1e-9 if kind != "sapo" else 1e-6)  # TRL's temperatures are of float32
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=1e-9)
    assert gradient[2].abs().max() == 0 < gradient[0].abs().max()


@pytest.mark.parametrize("kind", ["grpo", "vespo"])
def test_masked_sequences_and_the_corrected_kl_are_those_of_trl(kind, tmp_path):
    """`off_policy_mask_threshold`, `use_bias_correction_kl` and `delta` by its name."""
    options = {"off_policy_mask_threshold": 0.05, "use_bias_correction_kl": True, "beta": 0.1, **upper(kind)}
    cap = {"delta": 1.3} if kind == "grpo" else {}
    args = on_policy_config(GRPOConfig, tmp_path, loss_type=kind, num_mini_batches=2, **options, **cap)
    theirs, their_gradient = trl_gradient(kind, "token", 0.1, 1, threshold=0.05, correct=True, **cap)
    loss, gradient = our_gradient(args, 1)
    if kind == "grpo":
        theirs, their_gradient = theirs * 4 / 3, their_gradient * 4 / 3
    assert loss == pytest.approx(theirs, rel=1e-9)
    torch.testing.assert_close(gradient, their_gradient)
    without = on_policy_config(GRPOConfig, tmp_path, loss_type=kind, num_mini_batches=2, beta=0.1, **upper(kind))
    changed = [bool((gradient[row] != our_gradient(without, 1)[1][row]).any()) for row in (0, 1, 3)]
    assert all(changed)


def test_a_ratio_of_sequences_is_told_of_where_lengths_weigh(tmp_path, caplog):
    for kind in ("grpo", "dapo"):
        caplog.clear()
        args = on_policy_config(GRPOConfig, tmp_path, loss_type=kind, importance_sampling_level="sequence")
        assert ("weights each sequence by its completion length" in caplog.text) == (kind == "dapo")
    assert args.loss_aggregation == "token_mean"
    assert on_policy_config(GRPOConfig, tmp_path, loss_type="cispo").epsilon_high == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, dapo"),
        ({"loss_type": "sapo", "delta": 4.0}, r"soft gate .* leave importance_sampling_level and dual_clip \(delta\)"),
        ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos: only with loss_type: sapo"),
        ({"delta": 1.1}, r"delta .* must be above 1 \+ epsilon_high"),
        ({"use_bias_correction_kl": True, "kl_estimator": "k2"}, "corrects the k3 of the loss"),
        ({"entropy_target": 2.0}, "entropy_target: only with use_adaptive_entropy: true"),
        ({"loss_type": "vespo", "rollout_correction": "sequence_mask"}, "token_truncate or token_mask"),
        ({"mask_truncated_completions": True, "truncated": "keep"}, "leave one of them out"),
        (
            {"loss_type": "dapo", "loss_aggregation": "constant"},
            "is loss_aggregation: token_mean, and constant is given",
        ),
        ({"loss_type": "cispo", "epsilon_high": 0.3}, "largest importance weight itself"),
        (
            {"loss_type": "cispo", "epsilon_high": 5.0, "dual_clip": 3.0},
            "leave importance_sampling_level and dual_clip",
        ),
        ({"loss_type": "luspo"}, "set importance_sampling_level: sequence"),
    ],
)
def test_contradictions_are_told(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        on_policy_config(GRPOConfig, tmp_path, **options)
