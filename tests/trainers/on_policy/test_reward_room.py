"""A reward model that takes less than what will be drawn is refused when the trainer is made."""

import logging

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from align.data import toy
from align.errors import ConfigError
from align.reward_models.classifier import ClassifierReward
from align.reward_models.composite import CompositeReward
from tests.trainers.tiny_runs import on_policy, prompts, tiny_model


def reward(positions: int, *, policy_tokenizer=None, max_length=None) -> ClassifierReward:
    text = toy.tokenizer()
    config = LlamaConfig(
        vocab_size=len(text), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=positions, num_labels=1, pad_token_id=text.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    return ClassifierReward(
        model, name="judge", tokenizer=text, policy_tokenizer=policy_tokenizer, max_length=max_length
    )


def test_limits_are_compared_with_the_longest_prompt_and_completion(tmp_path, caplog):
    text, rows = toy.tokenizer(), prompts(8)

    def make(of, **given):
        trainer_class, args = on_policy("rloo", tmp_path, max_completion_length=6)
        return trainer_class(tiny_model(text), of, args, rows, processing_class=text, **given)

    longest = max(len(ids) for ids in make(reward(99)).train_dataset["prompt_ids"])
    enough = longest + 6
    make(reward(enough, policy_tokenizer=text))
    short = reward(enough - 1, policy_tokenizer=text)
    message = rf"'judge': the longest prompt \({longest} tokens\) and a completion may have {enough} tokens together, "
    with pytest.raises(ConfigError, match=rf"{message}and the model takes {enough - 1}.*max_length: {enough - 1}"):
        make(short)
    with pytest.raises(ConfigError, match=message):
        make(CompositeReward([short]))
    with pytest.raises(ConfigError, match=message):  # the gold reward only judges evaluations
        make(reward(99), gold_reward=short, eval_dataset=prompts(8))
    make(reward(99), gold_reward=short)
    make(reward(enough - 1, policy_tokenizer=text, max_length=6))
    with pytest.raises(ConfigError, match="max_length is 5, and a completion alone may have 6 tokens"):
        make(reward(enough, policy_tokenizer=text, max_length=5))
    with caplog.at_level(logging.WARNING):
        make(reward(enough - 1))  # whose tokens are not known to be the policy's
    assert "by the policy's tokenizer, which is not this reward's, the longest prompt" in caplog.text
