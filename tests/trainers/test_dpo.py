"""DPOTrainer and DPOConfig: every loss of the table trains; options; states; metrics."""

import pytest
import torch
from peft import LoraConfig

from align.data.tokenize import tokenize_pairs
from align.errors import ConfigError
from align.modeling.load import load_policy
from align.objectives.preference import LOSSES, register_loss
from align.trainers.dpo import DPOTrainer
from tests.trainers.pairs.preference_runs import assert_close, dpo_config, history, toy_pairs
from tests.trainers.tiny_runs import assert_same, logged, parameters

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
OPTIONS = {"exo_pair": {"label_smoothing": 0.01}}
ACROSS = [name for name, loss in LOSSES.items() if loss.across_pairs]


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return tokenize_pairs(toy_pairs(40), tokenizer, max_length=32)


def trained(policy, args, pairs, eval_pairs=None, **options) -> DPOTrainer:
    trainer = DPOTrainer(policy, args, pairs, eval_pairs, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_trains_whatever_the_micro_batches(loss, policy, pairs, tmp_path):
    """A loss across pairs is computed over per-device batches, so only these change it."""
    settings = {"loss_type": loss, "max_steps": 2, **OPTIONS.get(loss, {})}
    size = 4 if loss in ACROSS else 8
    whole = trained(policy, dpo_config(tmp_path / "a", per_device_train_batch_size=size, **settings), pairs)
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    if loss in ACROSS:
        cut |= {"gradient_accumulation_steps": 1, "batching": "padded", "chunk_size": 3}
    other = trained(policy, dpo_config(tmp_path / "b", **settings, **cut), pairs)
    assert_close(history(other, "loss", "grad_norm"), history(whole, "loss", "grad_norm"), rtol=2e-4, atol=1e-5)
    assert min(logged(whole, "grad_norm")) > 0
    assert not LOSSES[loss].needs_kl or min(logged(whole, "kl/chosen")[1:]) > 0
    assert (whole.reference is None) != LOSSES[loss].needs_reference


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_goes_through_a_checkpoint_a_resume_and_a_save(loss, policy, pairs, tmp_path):
    settings = {"loss_type": loss, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    args = dpo_config(tmp_path, **settings, **OPTIONS.get(loss, {}))
    whole = trained(policy, args, pairs)
    resumed = DPOTrainer(policy, args, pairs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(parameters(resumed.model), parameters(whole.model))
    resumed.save_model()
    assert_same(parameters(load_policy(str(tmp_path))), parameters(whole.model))


def test_a_mixture_is_the_weighted_sum_of_its_losses(policy, pairs, tmp_path):
    options = {"learning_rate": 0.0, "max_steps": 1, "ref_model_name_or_path": None}
    other = DPOTrainer(policy, dpo_config(tmp_path), pairs).model
    other.get_input_embeddings().weight.data.mul_(1.2)
    losses = {
        name: trained(policy, dpo_config(tmp_path, loss_type=name, beta=0.3, **options), pairs, ref_model=other)
        if LOSSES[name].needs_reference
        else trained(policy, dpo_config(tmp_path, loss_type=name, **options), pairs)
        for name in ("sigmoid", "bco_pair", "sft")
    }
    args = dpo_config(
        tmp_path, loss_type=list(losses), loss_weights=[0.8, 0.2, 2.0], beta=0.3, gradient_accumulation_steps=2,
        **{**options, "per_device_train_batch_size": 4},
    )  # fmt: skip
    mixed = trained(policy, args, pairs, ref_model=other)
    values = {name: logged(trainer, "loss")[0] for name, trainer in losses.items()}
    expected = 0.8 * values["sigmoid"] + 0.2 * values["bco_pair"] + 2.0 * values["sft"]
    assert logged(mixed, "loss")[0] == pytest.approx(expected, rel=1e-5)
    for name, value in values.items():
        assert logged(mixed, f"loss/{name}")[0] == pytest.approx(value, rel=1e-5)


def test_a_loss_of_ones_own(policy, pairs, tmp_path):
    @register_loss("test_squared")
    def squared(pairs, *, beta=0.1, target=1.0):
        return (beta * pairs.delta - target).square()

    try:
        trainer = trained(policy, dpo_config(tmp_path, loss_type="test_squared", loss_options={"target": 3.0}), pairs)
        assert logged(trainer, "loss")[0] == pytest.approx(9.0)
        with pytest.raises(ConfigError, match="targe would be ignored"):
            dpo_config(tmp_path, loss_type="test_squared", loss_options={"targe": 3.0})
        with pytest.raises(ConfigError, match="beta are keys of their own"):
            dpo_config(tmp_path, loss_type="test_squared", loss_options={"beta": 3.0})
    finally:
        del LOSSES["test_squared"]


@pytest.mark.parametrize(("options", "message"), [
    ({"label_smoothing": 0.1}, "label_smoothing would be ignored by sigmoid; the losses that use it: cdpo"),
    ({"loss_type": "sigmod"}, "loss_type 'sigmod' is unknown; nearest: 'sigmoid'"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 entries for 2 losses"),
    ({"loss_type": "aot", "use_weighting": True}, "use_weighting: True cannot be used with aot"),
    ({"loss_type": "bco_pair", "f_divergence_type": "forward_kl"}, "cannot be used with bco_pair"),
    ({"loss_type": ["sigmoid", "simpo"]}, "set beta: the losses have one beta together"),
    ({"beta": 0.0}, "beta must be > 0"),
    ({"loss_type": "aot", "per_device_train_batch_size": 1}, "aot compares the pairs of a micro-batch"),
    ({"loss_type": ["sigmoid", "beta_dpo"], "per_device_train_batch_size": 1}, "beta_dpo compares the pairs"),
    ({"loss_type": "simpo", "simpo_gamma": -1.0}, "simpo_gamma must be >= 0"),
])  # fmt: skip
def test_options_that_do_not_fit_the_loss_are_errors(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        dpo_config(tmp_path, **options)


@pytest.mark.parametrize(("options", "message"), [
    ({"loss_type": "simpo", "precompute_ref_log_probs": True}, "has no reference"),
    ({"loss_type": "orpo", "ref_model_name_or_path": "x"}, "has no reference"),
    ({"loss_type": "tdpo2", "precompute_ref_log_probs": True}, "compares whole distributions"),
    ({"loss_type": "aot", "tokens_per_batch": 100}, "depends on which pairs are in a micro-batch"),
])  # fmt: skip
def test_options_that_do_not_fit_the_reference_are_errors(options, message, policy, pairs, tmp_path):
    with pytest.raises(ConfigError, match=message):
        DPOTrainer(policy, dpo_config(tmp_path, **options), pairs)


@pytest.mark.parametrize("loss", ["tdpo1", "sigmoid"])
def test_weights_of_the_pairs(loss, policy, pairs, tmp_path):
    plain = trained(policy, dpo_config(tmp_path / "a", loss_type=loss, max_steps=1), pairs)
    weighted = trained(policy, dpo_config(tmp_path / "b", loss_type=loss, use_weighting=True, max_steps=1), pairs)
    share = logged(weighted, "loss")[0] / logged(plain, "loss")[0]
    assert 0 < share < 1  # the policy did not write these pairs


@pytest.mark.parametrize("lora", [None, LORA])
def test_beta_dpo_resumes_exactly(lora, policy, pairs, tmp_path):
    """Its running mean, deviation and random numbers go on; an evaluation leaves them alone."""
    settings = {"loss_type": "beta_dpo", "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    whole = trained(policy, dpo_config(tmp_path / "a", **settings), pairs, peft_config=lora)
    evaluated = {**settings, "eval_strategy": "steps", "eval_steps": 2}
    other = trained(policy, dpo_config(tmp_path / "b", **evaluated), pairs, pairs.select(range(9)), peft_config=lora)
    assert_same(parameters(other.model), parameters(whole.model))
    for step in (3, 5):
        resumed = DPOTrainer(policy, dpo_config(tmp_path / "a", **settings), pairs, peft_config=lora)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_same(parameters(resumed.model), parameters(whole.model))
        assert_close(history(resumed), history(whole), rtol=0, atol=0)
        ours, theirs = (t.objective.states["beta_dpo"].state_dict() for t in (resumed, whole))
        assert ours["sums"] == theirs["sums"] and ours["steps"] == 6
        assert torch.equal(ours["generator"], theirs["generator"])


def test_qlora_resolves():
    from align.cli import build
    from align.config import configs_dir
    from align.config.resolve import resolve

    tokens = ["--use_peft", "--load_in_4bit", "--lora_r", "8"]
    run = resolve("dpo", str(configs_dir() / "dpo.yaml"), tokens)
    assert build.peft_config(run).r == 8 and run.model.load_in_4bit and not run.training.holds_reference(adapter=True)


def test_log_probs_are_logged_as_ld_alpha_weighs_them(policy, pairs, tmp_path):
    """As TRL does; docs/preference.md says so."""
    settings = {"max_steps": 2, "learning_rate": 1e-2}
    plain = trained(policy, dpo_config(tmp_path / "a", **settings), pairs)
    desensitised = trained(policy, dpo_config(tmp_path / "b", ld_alpha=0.0, **settings), pairs)
    assert logged(desensitised, "logps/chosen")[0] > logged(plain, "logps/chosen")[0] + 0.1
