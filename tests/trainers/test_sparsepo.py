"""SparsePO and MaPO: the objective in the loop, masks under LoRA, their file, exact resume, guards."""

import json
import re

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from align.data.collate import PairCollator
from align.errors import ConfigError, TrainingError
from align.modeling.load import load_policy
from align.modeling.pairs import completions
from align.modeling.token_masks import FILE_NAME, load_masks, read_masks, watch_states
from align.trainers.masks.metrics import mask_metrics
from align.trainers.sparsepo import SparsePOConfig
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.sparse_runs import SparsePOTrainer, config, trainer
from tests.trainers.tiny_runs import assert_same, logged, parameters, tiny_model

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
VARIANTS = ("common", "independent", "mapo")
NO_DROPOUT = {"common": {"mask_dropout": 0.0}, "independent": {"mask_dropout": 0.0}, "mapo": {}}


def masks_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.masks.named_parameters()}


def losses_of(trainer, rows=slice(0, 6)):
    """Losses and gradients of one batch of the trainer's own pairs: [B], gradients by name, the tokens, metrics."""
    batch = trainer.planner.collate(trainer.train_dataset.select(range(*rows.indices(16))).to_list())
    trainer.model.zero_grad()
    policy, reference = trainer.forward(trainer.model.train(), batch)
    found = trainer.losses(policy, reference, batch)
    found.losses.mean().backward()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return found.losses.detach(), grads, policy, found.values()


def moved_policy(policy):
    """The policy after some steps, so that log-ratios and KL are not zero."""
    model = load_policy(policy)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


# ---- the objective ---------------------------------------------------------------------------------------------------


def test_metrics_of_weights_by_hand():
    weights = torch.tensor([[0.5, 0.0, 9.0], [0.2, 0.4, 0.0]])
    found = mask_metrics("mask_u", weights, torch.tensor([[1, 1, 0], [1, 1, 1]]))  # a chosen and a rejected completion
    wanted = {"mean": (0.25, 0.2), "sparsity": (0.5, 1 / 3), "l1": (0.5, 0.6)}
    assert {name: values.item() for name, values in found.items()} == pytest.approx(
        {
            f"mask_u_{name}/{side}": pair[i]
            for name, pair in wanted.items()
            for i, side in enumerate(("chosen", "rejected"))
        }
    )
    assert mask_metrics("mask_d", None, torch.ones(2, 3)) == {}


def test_weights_of_one_are_exactly_tdpo1(policy, tmp_path):
    """Learned masks that are 1 everywhere: the losses and gradients of TDPO1, from full distributions, in float64."""
    sparse = trainer(moved_policy(policy).double(), tmp_path, reference=load_policy(policy).double(), mask_dropout=0.0)
    with torch.no_grad():
        network = sparse.masks.networks["common"]
        for linear in network.first:
            linear.weight.zero_()
            linear.bias.fill_(1.0)
        network.mixer.weight.fill_(0.5)  # of two layers
    losses, grads, tokens, metrics = losses_of(sparse)
    assert torch.equal(tokens.m_u, tokens.mask.double()) and tokens.m_u is tokens.m_d

    batch = PairCollator(sparse.processing_class.pad_token_id)(sparse.train_dataset.select(range(6)).to_list())
    ids, mask = batch["input_ids"], batch["attention_mask"]
    real = batch["completion_mask"][:, 1:].bool()
    sparse.model.zero_grad()
    with torch.no_grad():
        ref = sparse.reference.model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    log_p = sparse.model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    ratios = ((log_p - ref).gather(-1, ids[:, 1:, None]).squeeze(-1) * real).sum(-1)
    kl = ((ref.exp() * (ref - log_p)).sum(-1) * real).sum(-1)
    z = (ratios[:6] - ratios[6:]) - (kl[6:] - kl[:6])
    tdpo1 = -torch.nn.functional.logsigmoid(0.5 * z)
    tdpo1.mean().backward()
    torch.testing.assert_close(losses, tdpo1.detach(), rtol=1e-9, atol=1e-9)
    for name, p in sparse.model.named_parameters():
        if "token_masks" not in name:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-5, atol=1e-6)  # a Llama norms in float32
    assert (kl > 0.01).all() and all(g.any() for n, g in grads.items() if ".first." in n or ".mixer." in n)
    torch.testing.assert_close(metrics["rewards/margins"], 0.5 * z.detach())
    torch.testing.assert_close(metrics["kl/chosen"], kl[:6])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shared_prefixes_do_not_change_losses_masks_and_gradients(variant, lora, policy, tmp_path):
    found = []
    for batching in ("padded", "shared_prefix"):
        one = trainer(
            load_policy(policy).double(), tmp_path, lora=LoraConfig(**LORA, init_lora_weights=False) if lora else None,
            reference=None if lora else moved_policy(policy).double(), variant=variant, batching=batching,
            **NO_DROPOUT[variant],
        )  # fmt: skip
        found.append(losses_of(one))
    (losses, grads, tokens, metrics), (other_losses, other_grads, other_tokens, other_metrics) = found
    torch.testing.assert_close(losses, other_losses, rtol=1e-6, atol=1e-6)  # a Llama norms in float32
    torch.testing.assert_close(tokens.m_u, other_tokens.m_u, rtol=1e-5, atol=1e-6)
    assert (metrics["kl/chosen"] > 1e-3).all() and grads.keys() == other_grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, other_grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_do_not_change_a_step(variant, policy, tmp_path):
    """8 pairs at once, in 4 + 4 and in 4 x 2, and cut by tokens: one loss, gradient norm and set of weights."""
    found = []
    for size, accumulated, options in ((8, 1, {}), (4, 2, {}), (2, 4, {}), (8, 1, {"tokens_per_batch": 90})):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, **options}
        one = trainer(load_policy(policy).double(), tmp_path, variant=variant, **NO_DROPOUT[variant], **options)
        one.train()
        found.append((logged(one, "loss"), logged(one, "grad_norm"), parameters(one.model)))
    for losses, norms, weights in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-7) and norms == pytest.approx(found[0][1], rel=1e-7)
        for name, p in found[0][2].items():
            torch.testing.assert_close(weights[name], p, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_metric_is_logged_and_consistent(variant, policy, tmp_path):
    on_kl = {"mask_on_kl": False} if variant == "mapo" else {}
    run = trainer(
        policy, tmp_path, eval_data=toy_pairs(4, seed=1), variant=variant, eval_strategy="steps", eval_steps=2, **on_kl
    )
    run.train()
    history = run.state.log_history
    first, metrics = history[0], next(e for e in history if "eval_loss" in e)
    terms = ("mask_u",) if variant == "mapo" else ("mask_u", "mask_d")
    names = [f"{t}_{what}" for t in terms for what in ("mean", "sparsity", "l1")]
    for name in ("rewards", "logps", "kl", "masked_kl", *names):
        for side in ("chosen", "rejected"):
            assert f"{name}/{side}" in first and f"eval_{name}/{side}" in metrics
    assert not any("mask_d" in name for name in first) or variant != "mapo"
    # before the first step the policy is its reference: nothing to weigh yet
    assert first["kl/chosen"] == pytest.approx(0, abs=1e-6) and first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert metrics["eval_kl/chosen"] > 1e-5
    if variant == "mapo":  # weight 1 on the KL
        assert metrics["eval_masked_kl/chosen"] == pytest.approx(metrics["eval_kl/chosen"])
        assert 0 < first["mask_u_mean/chosen"] < 1
    else:
        assert first["mask_u_mean/chosen"] == pytest.approx(1, abs=0.5)
        assert first["mask_u_sparsity/chosen"] < 0.3


def test_l1_is_halved_for_a_common_mask():
    options = {"output_dir": "x", "use_cpu": True, "mask_l1_reward": 0.1, "mask_l1_kl": 0.2}
    assert SparsePOConfig(**options).l1 == {"l1_u": 0.05, "l1_d": 0.1}
    assert SparsePOConfig(variant="independent", **options).l1 == {"l1_u": 0.1, "l1_d": 0.2}
    only = {**options, "mask_l1_reward": 0.0, "mask_on_reward": False}
    assert SparsePOConfig(**only).l1 == {"l1_u": 0.0, "l1_d": 0.2}


def test_l1_shrinks_the_masks_and_decay_is_theirs_alone(policy, tmp_path):
    plain = trainer(policy, tmp_path, max_steps=8, lr_scheduler_type="constant")
    plain.train()
    small = trainer(policy, tmp_path, max_steps=8, lr_scheduler_type="constant", mask_l1_kl=5.0)
    small.train()
    key = "mask_d_mean/chosen"
    assert logged(small, key)[-1] < logged(plain, key)[-1] - 0.05
    groups = small.optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0.0, 0.0, 0.01, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(list(small.model.parameters()))
    # weights (a linear per layer, the mixer), and biases with the norm's two
    assert [len(g["params"]) for g in groups[2:]] == [3, 4]


def test_the_masks_learning_rate(policy, tmp_path):
    """Zero: the masks stay, the policy moves. It follows the schedule of the others."""
    still = trainer(policy, tmp_path, mask_learning_rate=0.0)
    before, weights = masks_of(still), parameters(still.model)
    still.train()
    assert_same(masks_of(still), before)
    assert any(not torch.equal(p, weights[n]) for n, p in still.model.named_parameters())
    own = trainer(policy, tmp_path, mask_learning_rate=0.5, learning_rate=1e-3, lr_scheduler_type="linear")
    own.create_optimizer_and_scheduler(4)
    own.optimizer.step()
    own.lr_scheduler.step()
    assert [g["lr"] for g in own.optimizer.param_groups] == pytest.approx([7.5e-4, 7.5e-4, 0.375, 0.375])


def test_dropout_of_the_policy_is_off_and_that_of_the_masks_on(policy, tmp_path):
    run = trainer(policy, tmp_path, mask_dropout=0.4)
    assert {m.p for m in run.masks.modules() if isinstance(m, torch.nn.Dropout)} == {0.4}
    first, second = (losses_of(run)[2] for _ in range(2))
    assert not torch.equal(first.m_u, second.m_u) and torch.equal(first.logps, second.logps)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_mixed_precision(lora, policy, tmp_path):
    """bfloat16 autocast: policy and reference start as one, masks are float32 and change."""
    run = trainer(policy, tmp_path, lora=LoraConfig(**LORA) if lora else None, bf16=True, max_steps=3)
    before = masks_of(run)
    run.train()
    assert logged(run, "kl/chosen")[0] == pytest.approx(0, abs=1e-5) and logged(run, "kl/chosen")[-1] > 1e-5
    assert all(p.dtype == torch.float32 and not torch.equal(p, before[n]) for n, p in masks_of(run).items())


# ---- LoRA and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["common", "independent"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_masks_are_trained_saved_and_loaded(variant, lora, policy, tmp_path):
    run = trainer(policy, tmp_path, lora=LoraConfig(**LORA) if lora else None, variant=variant, max_steps=3)
    before = masks_of(run)
    run.train()
    after = masks_of(run)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    run.save_model()

    saved = list(tmp_path.glob("*.safetensors"))
    assert {path.name for path in saved} == {FILE_NAME, "adapter_model.safetensors" if lora else "model.safetensors"}
    loaded, reference = load_masks(tmp_path)
    assert_same({name: p.detach() for name, p in loaded.named_parameters()}, after)
    assert reference == policy
    # the model's own file holds no masks, and is the trained model
    again = load_policy(tmp_path)
    batch = PairCollator(run.processing_class.pad_token_id)(run.train_dataset.select(range(4)).to_list())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, run.model.eval()(**inputs).logits, rtol=1e-4, atol=1e-4)

    # from the files alone the masks are those of the trainer
    core = AutoModelForCausalLM.from_pretrained(reference)
    with torch.no_grad():
        with watch_states(core, completions(batch)) as states:
            core(**inputs)
        expected = run.forward(run.model, batch)[0]
        for ours, theirs in zip(loaded(states, expected.mask), (expected.m_u, expected.m_d), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_mapo_run_says_what_its_masks_are(policy, tmp_path):
    run = trainer(policy, tmp_path, variant="mapo", mask_activations="attn")
    run.train()
    run.save_model()
    assert not any("token_masks" in name for name, _ in run.model.named_parameters())
    description, weights = read_masks(tmp_path)
    assert description == {
        "variant": "mapo", "activations": "attn", "on_reward": True, "on_kl": True, "reference": policy,
    } and weights == {}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("variant", ["independent", "mapo"])
def test_resuming_is_exact(variant, lora, policy, tmp_path):
    """With dropout in the masks, at a step within an epoch (of 4 steps of 4 pairs) and after one."""
    options = {
        "variant": variant, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    if variant != "mapo":
        options |= {"mask_dropout": 0.3, "mask_learning_rate": 0.02}

    def make(folder):
        return trainer(policy, folder, lora=LoraConfig(**LORA) if lora else None, **options)

    straight = make(tmp_path / "a")
    straight.train()
    torch.manual_seed(99)
    resumed = make(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_same(parameters(resumed.model), parameters(straight.model))
    for key in ("loss", "grad_norm", "learning_rate", "kl/chosen", "mask_u_mean/chosen"):
        assert len(logged(straight, key)) == 6 and logged(resumed, key) == logged(straight, key)


def test_the_best_checkpoint_brings_its_masks(policy, tmp_path, caplog):
    run = trainer(
        policy, tmp_path, eval_data=toy_pairs(4, seed=1), max_steps=4, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_kl/chosen",
        greater_is_better=False, mask_learning_rate=0.05,
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")  # the KL grows
    assert_same(masks_of(run), read_masks(tmp_path / "checkpoint-2")[1])
    assert "missing keys" not in caplog.text  # the model's file is whole without them


def test_pictures_of_the_masks(policy, tmp_path):
    """At the end masks.html and masks.json, at evaluations a figure in TensorBoard; they show what training saw."""
    run = trainer(
        policy, tmp_path, eval_data=toy_pairs(5, seed=1), variant="independent", eval_strategy="steps", eval_steps=2,
        report_to="tensorboard", num_logged_pairs=2,
    )  # fmt: skip
    run.train()
    content = json.loads((tmp_path / "masks.json").read_text())
    assert len(content["pairs"]) == 2 and list(content["masks"]) == ["m_u", "m_d"]
    batch = run.planner.collate(run.eval_dataset.select(range(2)).to_list())
    with torch.no_grad():
        tokens, _ = run.forward(run.model.eval(), batch)
    shown = content["pairs"][1]["rejected"]
    count = int(tokens.mask[3].sum())
    assert shown["tokens"][-1].strip() == "<eos>" and len(shown["tokens"]) == count
    assert shown["masks"]["m_d"] == pytest.approx(tokens.m_d[3, :count].tolist())
    assert (tmp_path / "masks.html").read_text().count('title="') == 2 * sum(tokens.mask.sum(-1).tolist())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.glob("**/events.out.*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert [event.step for event in board.Images("eval/masks")] == [2]
    none = trainer(policy, tmp_path / "none", num_logged_pairs=0)
    none.train()
    assert not (tmp_path / "none" / "masks.json").exists()


def test_the_reference_holds_no_masks_and_is_not_trained(policy, tmp_path):
    run = trainer(policy, tmp_path)
    before = parameters(run.reference.model)
    run.train()
    assert_same(parameters(run.reference.model), before)
    assert not any("token_masks" in name for name in before)


@pytest.mark.parametrize("on_reward", [True, False])
def test_masks_that_are_all_zero_stop_a_run_whose_log_ratios_they_weigh(on_reward, policy, tmp_path):
    run = trainer(policy, tmp_path, max_steps=2, mask_on_reward=on_reward)
    with torch.no_grad():
        run.masks.networks["common"].mixer.weight.neg_()
    if not on_reward:
        assert run.train().global_step == 2 and all(norm > 0 for norm in logged(run, "grad_norm"))
        return
    with pytest.raises(TrainingError, match="every mask is 0 at every token of the last 1 step.*mask_learning_rate"):
        run.train()


# ---- guards ----------------------------------------------------------------------------------------------------------

IGNORED = {
    "mask_layers": "all",
    "mask_mlp_size": 8,
    "mask_init": "unit",
    "mask_dropout": 0.0,
    "mask_l1_reward": 0.1,
    "mask_l1_kl": 0.0,
    "mask_weight_decay": 0.1,
    "mask_learning_rate": 1e-3,
}


@pytest.mark.parametrize("name", IGNORED)
def test_options_of_learned_masks_are_errors_with_mapo(name, tmp_path):
    with pytest.raises(ConfigError, match=f"{name}: variant mapo would ignore this"):
        config(tmp_path, variant="mapo", **{name: IGNORED[name]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "sparse"}, "variant cannot be 'sparse'; valid: common, independent, mapo"),
        ({"mask_activations": "mlp"}, "mask_activations: variant common would ignore this"),
        ({"variant": "mapo", "mask_activations": "head"}, "no activations 'head'"),
        ({"mask_on_reward": False, "mask_on_kl": False}, "both false: that is TDPO1"),
        ({"variant": "independent", "mask_on_kl": False}, "use common"),
        ({"mask_on_kl": False, "mask_l1_kl": 0.1}, "mask_l1_kl: mask_on_kl is false"),
        ({"mask_layers": "first"}, "mask_layers must be one of all, last"),
        ({"mask_init": "zero"}, "mask_init must be one of unit, released"),
        ({"mask_dropout": 1.0}, "mask_dropout is a share"),
        ({"mask_mlp_size": 0}, "mask_mlp_size counts from 1"),
        ({"mask_weight_decay": -1.0}, "mask_weight_decay must not be negative"),
    ],
)
def test_what_makes_no_sense_is_said(options, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(tmp_path, **options)


def test_what_the_trainer_refuses(policy, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="precompute_ref_log_probs: this loss compares whole distributions"):
        trainer(policy, tmp_path, precompute_ref_log_probs=True)
    model = tiny_model(tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match="optimizer made before cannot train them"):
        SparsePOTrainer(model, config(tmp_path), toy_pairs(8), processing_class=tokenizer, optimizers=(optimizer, None))
