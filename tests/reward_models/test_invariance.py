"""A score is a property of one sequence: not of its batch, the order, the padding side or the padding token."""

import random

import pytest
import torch
import transformers as tf

from align.data.collate import left_pad, right_pad
from align.modeling.logprobs import token_logps
from align.modeling.scores import sequence_scores
from align.reward_models.classifier import ClassifierReward
from align.reward_models.implicit import ImplicitReward
from tests.modeling import tiny
from tests.reward_models import worlds

CLASSIFIERS = ["llama", "gpt2", "bert", "roberta"]
WIDTHS = {key: tiny.SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}


def classifier(kind):
    """float64, so that rounding cannot hide a difference."""
    torch.manual_seed(0)
    if kind in ("llama", "bert"):
        return tiny.classifier(kind)
    if kind == "gpt2":
        config = tf.GPT2Config(vocab_size=tiny.VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=1)
    else:
        config = tf.RobertaConfig(**WIDTHS, num_attention_heads=2, max_position_embeddings=66, num_labels=1)
    config.pad_token_id, config.initializer_range = tiny.PAD, 0.5
    return tf.AutoModelForSequenceClassification.from_config(config).double().eval()


def sequences(count=24, seed=0):
    """Of very different lengths, all ending with the end token, some with it inside too."""
    rng = random.Random(seed)
    return [[rng.randrange(1, tiny.VOCAB) for _ in range(rng.choice((1, 2, 5, 30)))] + [tiny.EOS] for _ in range(count)]


def alone(score, rows):
    return torch.cat([score([row]) for row in rows])


@pytest.fixture(scope="module", params=CLASSIFIERS)
def model(request):
    return classifier(request.param)


@pytest.mark.parametrize("pad", [right_pad, left_pad], ids=["right", "left"])
def test_classifiers(model, pad):
    rows = sequences()
    expected = torch.stack([by_hand(model, row) for row in rows])
    order = random.Random(1).sample(range(len(rows)), len(rows))
    own = model.config.model_type == "roberta"  # it counts its positions by its own padding token
    for pad_token in (tiny.PAD,) if own else (tiny.PAD, tiny.EOS):

        def score(rows, pad_token=pad_token):
            with torch.no_grad():
                return sequence_scores(model, *pad(rows, pad_token))

        torch.testing.assert_close(alone(score, rows), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(score(rows), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(score([rows[i] for i in order]), expected[order], rtol=0, atol=1e-10)


@torch.no_grad()
def by_hand(model, row):
    """The score of one sequence without padding: a causal model's head at the last token, an encoder's own output."""
    ids = torch.tensor([row])
    if hasattr(model, "score"):
        return model.score(model.base_model(input_ids=ids).last_hidden_state[0, -1])[0]
    return model(input_ids=ids).logits[0, 0]


def folder_reward(kind, folder):
    if kind == "implicit":
        for name, seed in (("policy", 0), ("reference", 1)):
            tiny.causal(seed=seed, dtype=torch.float32).save_pretrained(folder / name)
            worlds.tokenizer().save_pretrained(folder / name)
        reward = ImplicitReward(folder / "policy", reference=folder / "reference", device="cpu", dtype="float64")
        return reward, lambda rows: reward.score_ids([(row[:1], row[1:]) for row in rows])
    classifier(kind).float().save_pretrained(folder)
    worlds.tokenizer(encoder=kind in ("bert", "roberta")).save_pretrained(folder)
    reward = ClassifierReward(folder, device="cpu", dtype="float64")
    return reward, reward.score_ids


@pytest.mark.parametrize("kind", [*CLASSIFIERS, "implicit"])
def test_rewards(kind, tmp_path):
    """Whatever is scored together, by number of sequences or of tokens."""
    reward, score = folder_reward(kind, tmp_path)
    rows = sequences()
    expected = alone(score, rows)
    assert expected.std() > 1e-3
    for tokens in (1, 40, 100, 10_000):
        reward.batch_tokens = tokens
        torch.testing.assert_close(score(rows), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(score(rows[::-1]), expected.flip(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(score([*rows[:3], *rows[:3]]), expected[[0, 1, 2, 0, 1, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_probs_of_completions(kind):
    """What an implicit reward adds up, on either side of the padding."""
    model, rows = tiny.causal(kind), sequences()

    def score(rows, pad=right_pad):
        ids, mask = pad(rows, tiny.EOS)
        with torch.no_grad():
            return token_logps(model, ids, mask).sum(-1)

    expected = alone(score, rows)
    for pad in (right_pad, left_pad):
        torch.testing.assert_close(score(rows, pad), expected, rtol=0, atol=1e-9)
