import pytest
import torch
from peft import LoraConfig, get_peft_model

from align.data.batching import length_batches
from align.data.limits import longest_input
from align.errors import ConfigError, RewardError
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward
from align.reward_models.implicit import ImplicitReward
from tests.modeling import tiny
from tests.reward_models import worlds

PROMPTS = ["w1 w2 ", "w3 ", "w1 w4 w5 w6 ", "w1 w2 ", "w9 "]
COMPLETIONS = ["w7", "w8 w9 w10 w11 w12 w13", "w2", "w7 w7 w7", "w20 w21"]
TEXT = RewardBatch(PROMPTS, COMPLETIONS)
CHAT = RewardBatch(
    [[{"role": "user", "content": p.strip()}] for p in PROMPTS],
    [[{"role": "assistant", "content": c}] for c in COMPLETIONS],
)


def saved(folder, kind="llama", seed=0, **tokenizer_options):
    tiny.causal(kind, seed=seed, dtype=torch.float32).save_pretrained(folder)
    worlds.tokenizer(**tokenizer_options).save_pretrained(folder)
    return str(folder)


def saved_adapter(folder, base):
    torch.manual_seed(5)
    model = get_peft_model(
        tiny.causal(dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    worlds.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def reward(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("implicit")
    policy, reference = saved(folder / "a", request.param), saved(folder / "b", request.param, seed=1)
    return ImplicitReward(policy, reference=reference, beta=0.5, device="cpu", dtype="float64")


def by_hand(model, prompt, completion):
    """log p(completion | prompt), one sequence without padding, from the whole log-softmax."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    return logps[torch.arange(len(ids[0]) - 1), ids[0, 1:]][len(prompt) - 1 :].sum()


@pytest.mark.parametrize("batch", [TEXT, CHAT], ids=["text", "chat"])
def test_scores_are_the_log_ratios_and_depend_on_nothing_else(reward, batch):
    pairs = reward.encoder(batch)
    assert all(completion[-1] == tiny.EOS for _, completion in pairs)
    expected = [0.5 * (by_hand(reward.model, *pair) - by_hand(reward.reference.model, *pair)).item() for pair in pairs]
    scores = reward.score(batch).scores
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-5)
    assert scores.std() > 0.1
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(reward.score(batch.select(order)).scores, scores[order], rtol=0, atol=1e-6)
    tokens, reward.batch_tokens = reward.batch_tokens, 1
    torch.testing.assert_close(reward.score(batch).scores, scores, rtol=0, atol=1e-6)
    reward.batch_tokens = tokens
    reward.tokenizer.padding_side = "left"
    torch.testing.assert_close(reward.score(batch).scores, scores, rtol=0, atol=0)
    reward.tokenizer.padding_side = "right"


def test_an_adapter_is_its_own_reference(tmp_path):
    base = saved(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "adapter", base)
    alone = ImplicitReward(adapter, device="cpu")
    two = ImplicitReward(adapter, reference=base, device="cpu")
    scores = alone.score(TEXT).scores
    torch.testing.assert_close(scores, two.score(TEXT).scores, rtol=0, atol=1e-5)
    assert alone.name == "adapter" and scores.std() > 1e-3
    # a loaded model too, left in the mode it was in
    loaded = alone.model.train()
    again = ImplicitReward(loaded, tokenizer=worlds.tokenizer(), beta=0.2, device="cpu")
    torch.testing.assert_close(again.score(TEXT).scores, 2 * scores, rtol=1e-5, atol=1e-6)
    assert loaded.training is False  # as the constructor leaves it
    assert not again.score(TEXT).scores.requires_grad


def test_before_training_every_score_is_zero(tmp_path):
    """Policy = reference."""
    folder = saved(tmp_path)
    assert ImplicitReward(folder, reference=folder, device="cpu").score(TEXT).scores.tolist() == [0.0] * 5


def test_policy_ids_are_scored_as_they_are(tmp_path):
    folder = saved(tmp_path / "a")
    reward = ImplicitReward(
        folder, reference=saved(tmp_path / "b", seed=1), policy_tokenizer=worlds.tokenizer(), device="cpu"
    )
    batch = RewardBatch(PROMPTS[:2], COMPLETIONS[:2], [[7, 8], [9]], [[13, 1], [14, 15]])
    assert reward.encoder(batch) == [([7, 8], [13, 1]), ([9], [14, 15])]
    whole = reward.score(batch).scores
    cut = RewardBatch(PROMPTS[:2], COMPLETIONS[:2], [[7, 8], [9]], [[13], [14, 15]])
    shorter = reward.score(cut).scores
    assert shorter[1] == pytest.approx(whole[1].item(), abs=1e-6)  # rows of another width are rounded otherwise
    assert abs(shorter[0] - whole[0]) > 1e-3


def test_errors(tmp_path):
    folder = saved(tmp_path / "a")
    with pytest.raises(ConfigError, match="has no adapter to switch off, so name the reference"):
        ImplicitReward(folder)
    with pytest.raises(ConfigError, match="beta must be > 0, got 0"):
        ImplicitReward(folder, reference=folder, beta=0)
    with pytest.raises(ConfigError, match="batch_tokens must be at least 1"):
        ImplicitReward(folder, reference=folder, batch_tokens=0, device="cpu")
    other = tiny.causal(dtype=torch.float32)
    other.save_pretrained(tmp_path / "other")
    worlds.tokenizer(encoder=True).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="has another vocabulary than the model"):
        ImplicitReward(folder, reference=str(tmp_path / "other"), device="cpu")
    reward = ImplicitReward(folder, reference=folder, name="dpo", device="cpu")
    with pytest.raises(RewardError, match="'dpo', row 1 of the batch: the prompt is empty"):
        reward.score(RewardBatch(["w1 ", ""], ["w2", "w3"]))
    with pytest.raises(RewardError, match="'dpo', row 0 of the batch \\(row 17 of the dataset\\): 67 tokens, and the"):
        reward.score(RewardBatch(["w1 " * 65], ["w3"], rows=[17]))
    with torch.no_grad():
        reward.model.get_output_embeddings().weight[6 + 9] = float("nan")
    with pytest.raises(RewardError, match="'dpo' returned a non-finite score"):
        reward.score(TEXT)


def test_spec(tmp_path):
    folder = saved(tmp_path / "a")
    spec = {"type": "implicit", "path": folder, "reference": saved(tmp_path / "b", seed=1), "beta": 0.3, "name": "dpo"}
    reward = build_reward(spec, tokenizer=worlds.tokenizer(), device="cpu")
    assert reward.name == "dpo" and reward.beta == 0.3 and reward.encoder.shares_ids
    with pytest.raises(ConfigError, match="unknown key reward.refrence of an implicit reward; .*: reference"):
        build_reward({"type": "implicit", "path": folder, "refrence": folder})


def test_batches_of_similar_length():
    assert length_batches([3, 9, 4, 9, 1], max_tokens=18) == [[1, 3], [2, 0, 4]]
    assert length_batches([3, 9, 4, 9, 1], max_tokens=18, max_rows=1) == [[1], [3], [2], [0], [4]]
    assert length_batches([50, 2], max_tokens=18) == [[0], [1]]
    assert length_batches([], max_tokens=18) == []


def test_longest_input():
    import transformers as tf

    assert longest_input(tiny.causal()) == 64 and longest_input(tiny.causal("gpt2")) == 64
    sizes = {k: tiny.SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = tf.RobertaConfig(**sizes, num_attention_heads=2, max_position_embeddings=20, pad_token_id=1, num_labels=1)
    roberta = tf.RobertaForSequenceClassification(config).eval()
    assert longest_input(roberta) == 18
    roberta(input_ids=torch.full((1, 18), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 19), 5))
