"""The load-balancing loss of mixtures of experts: transformers' own, whatever the layout, and in the trained loss."""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule

from align.data import PairCollator, SharedPrefixCollator, toy
from align.errors import ConfigError, TrainingError
from align.modeling.completions import completion_logps
from align.modeling.experts import balancing_loss, watched_routers
from align.modeling.pairs import pair_tokens
from align.modeling.prefix_support import enable_shared_prefix
from align.trainers.core.experts import router_coefficient
from align.trainers.core.saving import verify_saved
from align.trainers.dpo import DPOTrainer
from align.trainers.on_policy.batches import collate
from tests.modeling import tiny
from tests.modeling.pair_models import pairs
from tests.trainers.on_policy.test_rollout_batches import SAMPLES
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import logged, on_policy, prompts, wanted_words


def mixture(kind="qwen3", **options):
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "num_experts_per_tok": 2, **options}
    if kind == "mixtral":
        return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_local_experts=4))
    return tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**sizes, moe_intermediate_size=8, num_experts=4, decoder_sparse_step=1)
    )


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_both_layouts_have_the_loss_that_transformers_computes(kind):
    model, found, gradients = mixture(kind), {}, {}
    router = next(p for name, p in model.named_parameters() if "gate" in name)
    padded = PairCollator(0)(pairs())
    expected = model(
        input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], output_router_logits=True
    ).aux_loss
    (gradients["transformers"],) = torch.autograd.grad(expected, router)
    assert enable_shared_prefix(model, None) is None
    for name, batch in {"padded": padded, "shared": SharedPrefixCollator()(pairs())}.items():
        with watched_routers(model) as seen:
            pair_tokens(model, batch)
            with torch.no_grad():
                pair_tokens(model, batch)  # of a reference that is the same module: it is not looked at
        found[name] = balancing_loss(model, seen["logits"], batch)
        (gradients[name],) = torch.autograd.grad(found[name], router)
    for name in found:
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients[name], gradients["transformers"], atol=1e-5, rtol=1e-4)


def test_a_class_that_derives_from_transformers_has_the_loss():
    """FSDP2 gives a sharded model a class in a module of torch's."""
    model, padded = mixture("mixtral"), PairCollator(0)(pairs())
    given = {name: padded[name] for name in ("input_ids", "attention_mask")}
    expected = model(**given, output_router_logits=True).aux_loss
    model.__class__ = type("FSDPMixtralForCausalLM", (FSDPModule, type(model)), {"__module__": FSDPModule.__module__})
    assert router_coefficient(model, 0.5) == 0.5
    with watched_routers(model) as seen:
        pair_tokens(model, padded)
    torch.testing.assert_close(balancing_loss(model, seen["logits"], padded), expected, atol=1e-5, rtol=1e-5)


def test_groups_of_any_size_have_the_same_loss():
    """Samples of a rollout: prompts with three, two and one of them, some of a single token."""
    model = mixture()
    assert enable_shared_prefix(model, None) is None
    padded, shared = (collate(SAMPLES[:-2], 0, shared_prefix=flag) for flag in (False, True))
    last = padded["attention_mask"].sum(-1) - 1  # predicts nothing, and shared rows do not hold it
    padded["attention_mask"][torch.arange(len(last)), last] = 0
    found = []
    for batch in (padded, shared):
        with watched_routers(model) as seen:
            completion_logps(model, batch)
        found.append(balancing_loss(model, seen["logits"], batch))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)


def test_which_coefficient(caplog):
    assert router_coefficient(mixture(), None) == 0.001 and router_coefficient(mixture(), 0.5) == 0.5
    assert router_coefficient(mixture(), 0.0) == 0 and router_coefficient(tiny.causal(), None) == 0
    assert not caplog.text
    with pytest.raises(ConfigError, match="no load-balancing loss for LlamaForCausalLM"):
        router_coefficient(tiny.causal(), 0.1)
    classifier = tf.Qwen3MoeForSequenceClassification(mixture().config)
    assert router_coefficient(classifier, None) == 0 and "without a load-balancing loss" in caplog.text
    assert router_coefficient(mixture(router_aux_loss_coef=0.9), 0.001) == 0.001 and "0.9" not in caplog.text
    assert router_coefficient(mixture(router_aux_loss_coef=0.9), None) == 0.9  # as GPT-OSS is published
    assert "router_aux_loss_coef: 0.9 is the model's own" in caplog.text
    left_on = mixture(output_router_logits=True)  # by TRL's SFT: transformers would add the loss as well
    assert router_coefficient(left_on, None) == 0.001 and not left_on.config.output_router_logits


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> str:
    folder, tokenizer = tmp_path_factory.mktemp("experts"), toy.tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    mixture(vocab_size=len(tokenizer), **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_checkpointing_keeps_its_gradient_or_is_refused(experts, tmp_path):
    norms = []
    for checkpointing in (False, True):
        args = dpo_config(tmp_path, max_steps=1, router_aux_loss_coef=10.0, gradient_checkpointing=checkpointing)
        trainer = DPOTrainer(experts, args, toy_pairs(8))
        trainer.train()
        norms += logged(trainer, "grad_norm")
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    args.gradient_checkpointing_kwargs = {"use_reentrant": True}
    with pytest.raises(ConfigError, match="use_reentrant: true the load-balancing loss"):
        DPOTrainer(experts, args, toy_pairs(8))


@pytest.mark.parametrize("batching", ["shared_prefix", "padded"])
def test_it_counts_once_per_step(experts, tmp_path, batching):
    """However many micro-batches a step has; it is a mean over them, as in transformers and TRL."""
    for size in (8, 4):
        args = dpo_config(
            tmp_path / f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1,
            batching=batching, router_aux_loss_coef=10.0,
        )  # fmt: skip
        trainer = DPOTrainer(experts, args, toy_pairs(8))
        trainer.train()
        (loss,), (aux,) = logged(trainer, "loss"), logged(trainer, "aux_loss")
        assert loss == pytest.approx(0.693147 + 10 * aux, rel=1e-5)


def test_on_policy(experts, tmp_path):
    """Balanced experts have a loss of experts_per_token / 1: 2. Training on it alone brings it there."""
    trainer_class, args = on_policy(
        "rloo", tmp_path, beta=0.0, router_aux_loss_coef=100.0, max_steps=6, learning_rate=3e-3
    )
    trainer = trainer_class(experts, wanted_words, args, prompts(64))
    trainer.train()
    trainer.close()
    aux = logged(trainer, "aux_loss")
    assert 2 <= aux[-1] < aux[0] - 0.01


@pytest.mark.parametrize(("kept", "batches"), [(6, 1), (6, 2), (0, 2)])
def test_samples_that_are_left_out_do_not_count(experts, tmp_path, kept, batches):
    """Equal scores have no advantage, so the loss is the experts' alone: counted once, or not without any sample."""

    def reward(completions):
        return [1.0 if i < kept else None for i in range(len(completions))]

    trainer_class, args = on_policy(
        "rloo", tmp_path, beta=0.0, router_aux_loss_coef=100.0, max_steps=1, loss_aggregation="sequence_mean",
        per_device_train_batch_size=8 // batches, gradient_accumulation_steps=batches,
    )  # fmt: skip
    trainer = trainer_class(experts, reward, args, prompts(64))
    trainer.train()
    trainer.close()
    (loss,) = logged(trainer, "loss")
    assert [loss / 100] == pytest.approx(logged(trainer, "aux_loss")) if kept else loss == 0


def test_what_was_saved_is_read_back_expert_by_expert(tmp_path):
    """Files have a tensor for each expert, the model one for all of a layer."""
    model, file = mixture(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    verify_saved(tmp_path, model, model.state_dict())
    tensors = load_file(file)
    name = next(name for name in tensors if ".experts.1." in name)
    tensors[name][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(TrainingError, match=f"{name} differs"):
        verify_saved(tmp_path, model, model.state_dict())


def test_tensors_that_cannot_be_compared_are_said(tmp_path, caplog):
    model, file = mixture(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    save_file({**load_file(file), "own.name": torch.zeros(1)}, file, {"format": "pt"})
    verify_saved(tmp_path, model, model.state_dict())
    assert "1 of 46 tensors were not compared" in caplog.text and "own.name" in caplog.text
