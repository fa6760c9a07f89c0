import pytest
import torch
from peft import LoraConfig

from align.errors import ConfigError
from align.modeling.load import load_policy, load_sequence_classifier, load_tokenizer, reference_of
from align.modeling.logprobs import token_logps
from align.modeling.pretrained import empty_model
from align.modeling.score_head import head_name
from align.modeling.scores import sequence_scores, to_right_padding
from tests.modeling import tiny


def test_policy_from_a_folder_and_from_memory(tmp_path):
    model = tiny.causal(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert load_policy(tmp_path).dtype == torch.float32
    assert load_policy(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16
    assert load_policy(model) is model
    with pytest.raises(ConfigError, match="dtype: .* already loaded"):
        load_policy(model, dtype="float32")
    with pytest.raises(ConfigError, match="cannot load the model '.*/nowhere'"):
        load_policy(f"{tmp_path}/nowhere")
    with pytest.raises(ConfigError, match="not loaded from anywhere"):
        load_tokenizer(tiny.causal())


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_no_policy(tied, tmp_path):
    """transformers draws an output layer, or takes the embeddings for it, and warns."""
    tiny.classifier(tie_word_embeddings=tied).save_pretrained(tmp_path)
    for load in (load_policy, empty_model):
        with pytest.raises(ConfigError, match="holds a reward model .*ForSequenceClass.*: name the model that"):
            load(str(tmp_path))
    tiny.causal(tie_word_embeddings=tied).save_pretrained(tmp_path)
    assert load_policy(tmp_path).get_output_embeddings() is not None and empty_model(str(tmp_path)) is not None


def test_the_adapter_of_a_reward_model_is_no_policy(tmp_path):
    """On a base that is a policy, whose config says nothing of it."""
    tiny.causal().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    load_sequence_classifier(tmp_path / "base", peft_config=config).save_pretrained(tmp_path / "adapter")
    for load in (load_policy, empty_model):
        with pytest.raises(ConfigError, match="/adapter is the adapter of a reward model, and a language model is nee"):
            load(str(tmp_path / "adapter"))
    assert empty_model(str(tmp_path / "adapter"), classifier=True) is not None


@pytest.mark.parametrize("tied", [True, False])
def test_a_trunk_is_a_policy_only_where_its_embeddings_are_its_output_layer(tied, tmp_path):
    tiny.causal(tie_word_embeddings=tied).base_model.save_pretrained(tmp_path)
    if tied:
        assert load_policy(tmp_path).get_output_embeddings() is not None
    else:
        with pytest.raises(ConfigError, match=r"holds no weights for its output layer \(lm_head.weight\)"):
            load_policy(tmp_path)


def test_reference_copy_and_adapter():
    ids, mask = tiny.rows()
    for peft_config in (None, LoraConfig(r=2, target_modules=["q_proj"])):
        model = load_policy(tiny.causal(), peft_config=peft_config)
        reference = reference_of(model)
        start = token_logps(model, ids, mask, temperature=0.5).detach()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.3
        assert not torch.allclose(token_logps(model, ids, mask, temperature=0.5), start, atol=1e-3)
        torch.testing.assert_close(reference.logps(ids, mask, 0.5), start, rtol=0, atol=1e-9)
        assert not reference.logps(ids, mask).requires_grad
        assert any(p.requires_grad for p in model.parameters())


def test_reference_given():
    ids, mask = tiny.rows()
    other = tiny.causal(seed=1)
    expected = token_logps(other, ids, mask).detach()
    reference = reference_of(tiny.causal(), other)
    torch.testing.assert_close(reference.logps(ids, mask), expected, rtol=0, atol=0)
    assert not any(p.requires_grad for p in other.parameters())


def test_adapter_folder_is_merged(tmp_path):
    base = tiny.causal()
    base.save_pretrained(tmp_path / "base")
    adapted = load_policy(
        str(tmp_path / "base"), peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    assert all(p.requires_grad for p in load_policy(tmp_path / "adapter").parameters())
    loaded = load_policy(tmp_path / "adapter", peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    ids, mask = tiny.rows()
    expected = token_logps(adapted, ids, mask)
    torch.testing.assert_close(token_logps(loaded, ids, mask), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(reference_of(loaded).logps(ids, mask), expected, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="already has an adapter"):
        load_policy(loaded, peft_config=LoraConfig(r=2))
    with pytest.raises(ConfigError, match="layers of the model have an adapter already.*load the model anew"):
        load_policy(loaded.get_base_model(), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


def test_a_classifier_on_the_trunk_of_a_policys_adapter(tmp_path):
    """Its layers read the attention in a config of their own: soft caps were left out, and prompts never shared."""
    base = tiny.causal("gemma2", dtype=torch.float32)
    base.config.attn_logit_softcapping = 0.5
    base.save_pretrained(tmp_path / "base")
    adapted = load_policy(str(tmp_path / "base"), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    ids, mask = tiny.rows()
    scores = {}
    for attention in (None, "eager"):
        model = load_sequence_classifier(tmp_path / "adapter", attn_implementation=attention, pad_token_id=tiny.PAD)
        assert model.config is model.model.config is model.model.layers[0].self_attn.config
        scores[attention] = sequence_scores(model.eval(), ids, mask)
    torch.testing.assert_close(scores[None], scores["eager"], rtol=0, atol=1e-5)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(sequence_scores(model, ids, mask), scores["eager"], atol=1e-3)


def test_the_policy_is_not_its_own_reference():
    policy = tiny.causal()
    with pytest.raises(ConfigError, match="ref_model is the policy itself.*leave it out"):
        reference_of(policy, policy)
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_head_is_drawn_once_and_seeded(tmp_path, kind):
    trunk = tiny.classifier(kind, dtype=torch.float32, hidden_size=64)
    inner = trunk.model if kind == "llama" else trunk.bert
    inner.save_pretrained(tmp_path / "trunk")
    a, b, c = (load_sequence_classifier(tmp_path / "trunk", head_seed=s, pad_token_id=0) for s in (1, 1, 2))
    head = [m.get_submodule(head_name(m)).weight for m in (a, b, c)]
    assert torch.equal(head[0], head[1]) and not torch.equal(head[0], head[2])
    assert head[0].std().item() == pytest.approx(65**-0.5, rel=0.3)
    a.save_pretrained(tmp_path / "trained")
    again = load_sequence_classifier(tmp_path / "trained", head_seed=7)
    assert torch.equal(again.get_submodule(head_name(again)).weight, head[0])


def test_two_labels_are_refused(tmp_path):
    model = tiny.classifier("bert")
    model.config.num_labels = 3
    model.config.save_pretrained(tmp_path)
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="3 labels"):
        load_sequence_classifier(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_scores_do_not_depend_on_padding(kind):
    model = tiny.classifier(kind)
    ids, mask = tiny.rows(lengths=(9, 1, 4, 6))
    alone = torch.stack(
        [sequence_scores(model, i[m.bool()][None], m[m.bool()][None])[0] for i, m in zip(ids, mask, strict=True)]
    )
    wide = torch.nn.functional.pad(ids, (3, 5), value=17), torch.nn.functional.pad(mask, (3, 5))
    left = tiny.rows(lengths=(9, 1, 4, 6), side="left")
    for inputs in ((ids, mask), left, wide):
        torch.testing.assert_close(sequence_scores(model, *inputs), alone, rtol=0, atol=1e-9)
    assert alone.std() > 1e-3


def test_scores_read_the_end_token_where_it_is_also_the_padding():
    model = tiny.classifier("llama", pad_token_id=tiny.EOS)
    ids = torch.tensor([[5, 6, 7, tiny.EOS], [5, 6, tiny.EOS, tiny.EOS]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    scores = sequence_scores(model, ids, mask)
    hidden = model.model(input_ids=ids[:1]).last_hidden_state[0, 3]
    torch.testing.assert_close(scores[0], model.score(hidden)[0], rtol=0, atol=1e-9)
    assert not torch.allclose(scores[0], model(input_ids=ids[:1], attention_mask=mask[:1]).logits[0, 0])
    scores.sum().backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_to_right_padding():
    ids, mask = to_right_padding(torch.tensor([[9, 9, 1, 2], [3, 4, 9, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]))
    assert ids[:, :2].tolist() == [[1, 2], [3, 4]] and mask.tolist() == [[1, 1, 0, 0]] * 2


@pytest.mark.parametrize("part", ["lm_head", "model.layers.0.mlp", "model.embed_tokens"])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])])
def test_a_model_of_which_a_part_is_in_float64_is_refused(part, peft_config):
    model = tiny.causal(dtype=torch.float32)
    model.get_submodule(part).to(torch.float64)
    with pytest.raises(ConfigError, match=rf"the model has weights in float\d\d \(.*{part}.*: make them one dtype"):
        load_policy(model, peft_config=peft_config)
    assert load_policy(model.float(), peft_config=peft_config).dtype == torch.float32
    policy = tiny.causal(dtype=torch.float32)
    with pytest.raises(ConfigError, match="make them one dtype first"):
        reference_of(policy, tiny.causal(dtype=torch.float32).to(torch.float64).apply(_single_norms))


def _single_norms(module):
    if "Norm" in type(module).__name__:
        module.float()


def test_a_classifier_with_a_head_in_float64_is_refused():
    classifier = tiny.classifier(dtype=torch.float32)
    classifier.score.to(torch.float64)
    with pytest.raises(ConfigError, match=r"and float64 \(score.weight\): make them one dtype first, with model.float"):
        load_sequence_classifier(classifier)
