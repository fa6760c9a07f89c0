"""At which token a reward model is read: the same text has the same score in RL and in evaluations."""

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from align.modeling.score_head import READ_AT
from align.reward_models.base import RewardBatch
from align.reward_models.classifier import ClassifierReward
from align.reward_models.ensemble import load_ensemble
from align.reward_models.export import export_reward_model
from align.trainers.reward import RewardConfig, RewardTrainer
from align.trainers.sweeps.ensemble import train_reward_ensemble

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
        cut = reward.inputs(in_training(policy, ["yes"], [False]))[0]
        assert cut[-1] == WORDS.index("yes")


def test_a_model_is_read_where_it_was_trained(model):
    tokenizer = gemma_like()
    reward = ClassifierReward(model, tokenizer=tokenizer, device="cpu")
    whole = tokenizer.apply_chat_template(TALK[0] + TALK[1], return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(whole[-2:]) == ["<end>", "\n"]
    ours = getattr(model.config, READ_AT, None) == "end_token"
    expected = model(torch.tensor([whole[:-1] if ours else whole])).logits[0]
    torch.testing.assert_close(reward.score(RewardBatch([TALK[0]], [TALK[1]])).scores, expected.detach())


WORDS_OF = ("yes", "no", "hi")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of a LoRA reward model and of an ensemble of two, trained on messages. The base pads with its end token,
    and its template writes a line break after it, as SmolLM2's does."""
    root = tmp_path_factory.mktemp("adapters")
    tokenizer = gemma_like()
    tokenizer.eos_token = tokenizer.pad_token = "<end>"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), initializer_range=0.3, **ends, **sizes)).save_pretrained(
        root / "base"
    )
    tokenizer.save_pretrained(root / "base")

    def says(word):
        return [{"role": "assistant", "content": word}]

    rows = Dataset.from_list([{"prompt": TALK[0], "chosen": says("yes"), "rejected": says("no")}] * 8)
    options = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    peft = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = RewardTrainer(
        str(root / "base"), RewardConfig(output_dir=str(root / "one"), **options), rows, rows, peft_config=peft
    )
    trainer.train()
    trainer.save_model()
    args = RewardConfig(output_dir=str(root / "two"), **options)
    train_reward_ensemble(str(root / "base"), args, rows, rows, members=2, kind="lora", peft_config=peft)
    return root


def at_the_end_token(folder):
    """Scores of the words as answers, by PEFT's own loader, read at `<end>`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    scores = []
    for word in WORDS_OF:
        turns = [*TALK[0], {"role": "assistant", "content": word}]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["<end>", "\n"]
        with torch.no_grad():
            scores.append(model.eval()(torch.tensor([ids[:-1]])).logits[0, 0])
    return torch.stack(scores)


def test_an_adapter_is_read_where_it_was_trained(adapters, tmp_path, caplog):
    """The base's config, which is all the config that an adapter has, does not say where that is."""
    batch = RewardBatch([TALK[0]] * 3, [[{"role": "assistant", "content": word}] for word in WORDS_OF])
    one = str(adapters / "one")
    expected = at_the_end_token(one)
    assert expected.std() > 1e-3
    whole = export_reward_model(one, tmp_path / "whole")
    caplog.set_level("INFO")
    for folder in (one, whole):
        scores = ClassifierReward(str(folder), normalize=False, device="cpu").score(batch).scores
        torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)
    assert "has no score head" not in caplog.text  # of the base; the adapter's is read
    members = [adapters / "two" / f"member_{i}" for i in range(2)]
    ensemble = load_ensemble(adapters / "two", "mean", normalize=False, device="cpu").score(batch).extras
    for member in members:
        expected = at_the_end_token(member)
        alone = ClassifierReward(str(member), normalize=False, device="cpu").score(batch).scores
        torch.testing.assert_close(alone, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(ensemble[member.name.replace("_", "/")], expected, rtol=0, atol=2e-5)
