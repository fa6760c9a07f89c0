"""One model that holds several members scores as the members do one by one."""

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel

from align.errors import ConfigError
from align.modeling.member_lora import adapter_parameters, add_member_adapters, load_adapter, save_adapter
from align.modeling.members import (
    Members,
    layer_list,
    member_scores,
    member_state,
    share_trunk,
)
from align.modeling.scores import sequence_scores
from align.modeling.shared_prefix import compute_soft_caps
from tests.modeling import tiny

SMALL = {
    "vocab_size": tiny.VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": tiny.PAD, "bos_token_id": 1,
    "eos_token_id": 1, "num_labels": 1, "initializer_range": 0.5,
}  # fmt: skip
DISTIL = {"vocab_size": tiny.VOCAB, "dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": tiny.VOCAB, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64, "pad_token_id": tiny.PAD}
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "qwen2": lambda: tf.Qwen2Config(**SMALL, num_key_value_heads=1),
    "gemma2": lambda: tf.Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, sliding_window=4),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SMALL),
    "gpt2": lambda: tf.GPT2Config(**GPT2, num_labels=1, bos_token_id=1, eos_token_id=1, initializer_range=0.5),
    "bert": lambda: tf.BertConfig(**SMALL),
    "roberta": lambda: tf.RobertaConfig(**SMALL),
    "distilbert": lambda: tf.DistilBertConfig(**DISTIL, num_labels=1, initializer_range=0.5),
}


def member_parameters(model, count):
    """Per member, the parameters that are its own."""
    stacks = [module.members for module in model.modules() if isinstance(module, Members)]
    return [[p for stack in stacks for p in stack[i].parameters()] for i in range(count)]


def classifier(kind):
    torch.manual_seed(0)
    model = tf.AutoModelForSequenceClassification.from_config(CONFIGS[kind]())
    compute_soft_caps(model)  # as align.modeling.load does
    return model.double().eval()


def shake(model):
    """Members that differ everywhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameters in member_parameters(model, 3):
            for p in parameters:
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("upper", [1, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_shared_trunk_scores_as_its_members(kind, upper):
    plain = classifier(kind)
    joint = share_trunk(copy.deepcopy(plain), [5, 6, 7], upper)
    ids, mask = tiny.rows((7, 3, 5))
    started = member_scores(joint, ids, mask, 3)
    assert started.shape == (3, 3) and not torch.allclose(started[0], started[1])  # heads differ
    shake(joint)
    scores = member_scores(joint, ids, mask, 3)
    for i in range(3):
        alone = copy.deepcopy(plain)
        alone.load_state_dict(member_state(joint.state_dict(), i))
        torch.testing.assert_close(scores[i], sequence_scores(alone, ids, mask), rtol=0, atol=1e-10)
    left = member_scores(joint, *tiny.rows((7, 3, 5), side="left"), 3)
    torch.testing.assert_close(left, scores, rtol=0, atol=1e-10)
    one = member_scores(joint, ids[1:2, :3], mask[1:2, :3], 3)
    torch.testing.assert_close(one, scores[:, 1:2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_gradients_stay_with_their_member(kind):
    joint = share_trunk(classifier(kind), [5, 6, 7], 1)
    ids, mask = tiny.rows((7, 3, 5))
    member_scores(joint, ids, mask, 3)[1].sum().backward()
    touched = [any(p.grad is not None and p.grad.any() for p in own) for own in member_parameters(joint, 3)]
    assert touched == [False, True, False]
    shared = {name for name, p in joint.named_parameters() if ".members." not in name}
    assert shared and not any(joint.get_parameter(name).requires_grad for name in shared)
    trained = share_trunk(classifier(kind), [5, 6, 7], 1, train_trunk=True)
    assert all(p.requires_grad for p in trained.parameters())


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        joint = share_trunk(classifier("llama"), [5, 6], 2, train_trunk=True).train()
        if checkpointing:
            joint.gradient_checkpointing_enable({"use_reentrant": False})
        member_scores(joint, *tiny.rows((7, 3, 5)), 2).square().sum().backward()
        gradients.append([p.grad for p in joint.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_copied():
    joint = share_trunk(classifier("gpt2"), [0, 1], 1)
    copied = {name for name, module in joint.named_modules() if isinstance(module, Members)}
    assert copied == {"transformer.h.2", "transformer.ln_f", "score"}


# ---- LoRA

TARGETS = {
    "gpt2": ["c_attn"],
    "gpt_neox": "all-linear",
    "bert": "all-linear",
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "ffn.lin1"],
}


def lora(kind, **options):
    defaults = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS.get(kind, ["q_proj", "up_proj"])}
    return LoraConfig(**{**defaults, **options})


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_on_one_model_score_as_peft_does(kind, tmp_path):
    config = lora(kind, **({"layers_to_transform": [1, 2]} if kind == "qwen2" else {}))
    config.fan_in_fan_out = kind == "gpt2"
    joint = add_member_adapters(classifier(kind), config, [5, 6, 7])
    joint.double()
    with torch.no_grad():
        for p in adapter_parameters(joint):
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    for ids, mask in (tiny.rows((7, 3, 5)), tiny.rows((7, 3, 5), side="left"), tiny.rows((4,))):
        scores = member_scores(joint, ids, mask, 3)
        assert not torch.allclose(scores[0], scores[1])
        for i in range(3):
            save_adapter(joint, i, config, tmp_path / f"member_{i}")
            alone = PeftModel.from_pretrained(classifier(kind), tmp_path / f"member_{i}").double().eval()
            torch.testing.assert_close(scores[i], sequence_scores(alone, ids, mask), rtol=0, atol=1e-6)
    fresh = add_member_adapters(classifier(kind), config, [1, 2, 3]).double()
    for i in range(3):
        load_adapter(fresh, i, tmp_path / f"member_{i}")
    torch.testing.assert_close(member_scores(fresh, ids, mask, 3), scores, rtol=0, atol=0)


def test_adapters_start_at_nothing_and_train_alone():
    plain = classifier("llama")
    joint = add_member_adapters(copy.deepcopy(plain), lora("llama"), [5, 6, 7]).double()
    ids, mask = tiny.rows((7, 3, 5))
    head = joint.score.members[1].weight
    hidden = plain.model(input_ids=ids, attention_mask=mask).last_hidden_state[torch.arange(3), mask.sum(1) - 1]
    torch.testing.assert_close(member_scores(joint, ids, mask, 3)[1], hidden @ head[0], rtol=0, atol=1e-10)
    trained = {name for name, p in joint.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in joint.named_parameters() if "lora_" in name or "score." in name}
    member_scores(joint, ids, mask, 3)[1].sum().backward()
    for p in adapter_parameters(joint)[1::2]:  # B; the gradient of A is 0 while B is
        assert p.grad[1].any() and not p.grad[0].any() and not p.grad[2].any()
    a = adapter_parameters(joint)[0]
    assert not torch.equal(a[0], a[1]) and a.abs().max() <= a.shape[-1] ** -0.5


def test_recomputed_adapters_have_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        joint = add_member_adapters(classifier("llama"), lora("llama"), [5, 6]).double().train()
        if checkpointing:
            joint.gradient_checkpointing_enable({"use_reentrant": False})
        member_scores(joint, *tiny.rows((7, 3, 5)), 2).square().sum().backward()
        gradients.append([p.grad for p in joint.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradients", [False, True])
def test_mixed_precision(gradients):
    models = (
        add_member_adapters(classifier("llama").float(), lora("llama"), [5, 6]),
        share_trunk(classifier("llama").float(), [5, 6], 1),
    )
    for model in models:
        whole = member_scores(model, *tiny.rows((7, 3)), 2)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
            mixed = member_scores(model, *tiny.rows((7, 3)), 2)
        assert mixed.dtype == torch.float32 and mixed.requires_grad == gradients
        torch.testing.assert_close(mixed, whole, rtol=0.1, atol=0.1, check_device=False)


def test_refused_lora(tmp_path):
    with pytest.raises(ConfigError, match="plain LoRA only: leave bias, use_dora out"):
        add_member_adapters(classifier("llama"), lora("llama", use_dora=True, bias="all"), [0, 1])
    with pytest.raises(ConfigError, match="must be inside of the layers .*: model.embed_tokens"):
        add_member_adapters(classifier("llama"), lora("llama", target_modules=["embed_tokens", "q_proj"]), [0, 1])
    with pytest.raises(ConfigError, match="LoRA cannot be added to LlamaForSequenceClassification: Target modules"):
        add_member_adapters(classifier("llama"), lora("llama", target_modules=["nothing"]), [0, 1])
    joint = add_member_adapters(classifier("llama"), lora("llama"), [0, 1])
    save_adapter(joint, 0, lora("llama"), tmp_path)
    other = add_member_adapters(classifier("llama"), lora("llama", r=3), [0, 1])
    with pytest.raises(ConfigError, match="not an adapter of the same shape"):
        load_adapter(other, 1, tmp_path)


def test_refused():
    with pytest.raises(ConfigError, match="3 layers: each member can have 1 to 2 upper layers of its own, got 3"):
        share_trunk(classifier("llama"), [0, 1], 3)
    bart = tf.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_labels=1,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="BartForSequenceClassification has no single list of 2 layers"):
        layer_list(tf.AutoModelForSequenceClassification.from_config(bart))
    albert = tf.AlbertConfig(**{**SMALL, "embedding_size": 8})
    with pytest.raises(ConfigError, match="use separate members"):
        layer_list(tf.AutoModelForSequenceClassification.from_config(albert))
