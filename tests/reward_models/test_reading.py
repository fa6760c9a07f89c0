"""At which token a reward model is read: the same text has the same score in RL and in evaluations."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from align.reward_models.base import RewardBatch
from align.reward_models.classifier import READ_AT, ClassifierReward

WORDS = ["<pad>", "<eos>", "<bos>", "<start>", "<end>", "<eom>", "user", "assistant", "hi", "yes", "no", "\n", "<unk>"]
TEMPLATE = "<bos>{% for m in messages %}<start>{{ m.role + '\n' + m.content }}<end>\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<start>assistant\n{% endif %}"


def gemma_like(mark=""):
    """The end of turn is not the tokenizer's EOS, and a line break follows it."""
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    raw.pre_tokenizer = Split("\n", "isolated")
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, additional_special_tokens=["<start>", "<end>", "<eom>"], **special
    )
    tokenizer.chat_template = mark + TEMPLATE
    return tokenizer


@pytest.fixture(params=["trained here", "from the hub"])
def model(request):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), num_labels=1, pad_token_id=0, initializer_range=0.3, **sizes)
    if request.param == "trained here":
        setattr(config, READ_AT, "end_token")
    return LlamaForSequenceClassification(config)


TALK = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yes"}]


def in_training(tokenizer, words, ended):
    """The batch of a rollout."""
    prompt = tokenizer.apply_chat_template(TALK[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    return RewardBatch([TALK[0]], [TALK[1]], [prompt], [[WORDS.index(word) for word in words]], ended=ended)


def test_one_score_for_one_text(model):
    tokenizer = gemma_like()
    evaluated = (
        ClassifierReward(model, tokenizer=tokenizer, device="cpu").score(RewardBatch([TALK[0]], [TALK[1]])).scores
    )
    for policy in (gemma_like(), gemma_like(mark="{# another #}")):
        reward = ClassifierReward(model, tokenizer=tokenizer, policy_tokenizer=policy, device="cpu")
        assert reward.shares_ids == (policy.chat_template == tokenizer.chat_template)
        for end in ("<end>", "<eos>", "<eom>"):  # <eom>: only the generation config knows that it ends an answer
            ended = [True] if end == "<eom>" else None
            assert torch.equal(reward.score(in_training(policy, ["yes", end], ended)).scores, evaluated)
        cut = reward.sequences(in_training(policy, ["yes"], [False]))[0]
        assert cut[-1] == WORDS.index("yes")


def test_a_model_is_read_where_it_was_trained(model):
    tokenizer = gemma_like()
    reward = ClassifierReward(model, tokenizer=tokenizer, device="cpu")
    whole = tokenizer.apply_chat_template(TALK[0] + TALK[1], return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(whole[-2:]) == ["<end>", "\n"]
    ours = getattr(model.config, READ_AT, None) == "end_token"
    expected = model(torch.tensor([whole[:-1] if ours else whole])).logits[0]
    torch.testing.assert_close(reward.score(RewardBatch([TALK[0]], [TALK[1]])).scores, expected.detach())
