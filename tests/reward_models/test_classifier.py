from dataclasses import replace

import pytest
import torch

from align.errors import ConfigError, RewardError
from align.reward_models.base import RewardBatch
from align.reward_models.classifier import ClassifierReward
from align.reward_models.normalizer import Normalizer
from align.reward_models.sequences import same_tokenizer
from tests.modeling import tiny
from tests.reward_models import worlds

PROMPTS = ["w1 w2 ", "w3 ", "w1 w4 w5 w6 ", "w1 w2 ", "w9 "]  # words are split at spaces
COMPLETIONS = ["w7", "w8 w9 w10 w11 w12 w13", "w2", "w7 w7 w7", "w20 w21"]
CHAT = RewardBatch(
    [[{"role": "user", "content": p.strip()}] for p in PROMPTS],
    [[{"role": "assistant", "content": c}] for c in COMPLETIONS],
)
TEXT = RewardBatch(PROMPTS, COMPLETIONS)


def take(batch: RewardBatch, rows) -> RewardBatch:
    return RewardBatch([batch.prompts[i] for i in rows], [batch.completions[i] for i in rows])


@pytest.fixture(scope="module", params=["llama", "bert", "llama with pad = eos"])
def reward(request, tmp_path_factory):
    kind = request.param.split()[0]
    folder = worlds.reward_folder(tmp_path_factory.mktemp("rm"), kind)
    made = ClassifierReward(folder, device="cpu", dtype="float64")
    if "pad = eos" in request.param:
        made.tokenizer.pad_token = made.tokenizer.eos_token
        made.model.config.pad_token_id = made.tokenizer.eos_token_id
    return made


def test_the_template_gets_the_columns_that_it_has_in_training(tmp_path):
    """Else a model that was trained on pairs with tools, or without thoughts, scores prompts that it has never seen."""
    template = "{% if tools %}{{ tools[0].function.name }} {% endif %}{% if not thoughts %}w21 {% endif %}"
    made = ClassifierReward(worlds.reward_folder(tmp_path, template=template + worlds.TEMPLATE))
    tool = {"type": "function", "function": {"name": "w20", "description": "d", "parameters": {}}}
    columns = {"tools": [[tool], None], "chat_template_kwargs": [{"thoughts": False}, {"thoughts": True}]}
    inputs = made.inputs(replace(take(CHAT, [1, 1]), columns=columns))
    assert [made.tokenizer.decode(ids).split()[:2] for ids in inputs] == [["w20", "w21"], ["U:", "w3"]]


@pytest.mark.parametrize("batch", [TEXT, CHAT], ids=["text", "chat"])
def test_scores_do_not_depend_on_batch_size_order_or_neighbours(reward, batch):
    scores = reward.score(batch).scores
    assert scores.dtype == torch.float32 and scores.std() > 1e-3
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(reward.score(take(batch, order)).scores, scores[order], rtol=0, atol=1e-6)
    alone = torch.cat([reward.score(take(batch, [i])).scores for i in range(5)])
    torch.testing.assert_close(alone, scores, rtol=0, atol=1e-6)
    reward.batch_size = 2
    torch.testing.assert_close(reward.score(batch).scores, scores, rtol=0, atol=1e-6)
    reward.batch_size = 32


def test_the_end_token_is_read(reward):
    """The score is that of prompt + completion + EOS, by hand, without padding."""
    ids = reward.inputs(TEXT)[0]
    assert ids[-1] == 1 and ids[-2] == 6 + 7
    if reward.model.config.model_type == "llama":
        hidden = reward.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        expected = reward.model.score(hidden)[0].item()
    else:
        assert ids[0] == 2  # CLS in front
        expected = reward.model(input_ids=torch.tensor([ids])).logits[0, 0].item()
    assert reward.score(TEXT).scores[0].item() == pytest.approx(expected, abs=1e-6)


def test_no_gradient_and_training_mode_is_left_alone(reward):
    reward.model.train()
    assert not reward.score(TEXT).scores.requires_grad
    assert reward.model.training
    reward.model.eval()


def test_chat_template_and_no_second_end_token(tmp_path):
    reward = ClassifierReward(worlds.reward_folder(tmp_path), device="cpu")
    assert reward.tokenizer.convert_ids_to_tokens(reward.inputs(CHAT)[0]) == ["U:", "w1", "w2", "A:", "w7", "</s>"]


def test_policy_ids_are_scored_where_the_tokenizers_are_the_same(tmp_path):
    folder = worlds.reward_folder(tmp_path)
    batch = RewardBatch(PROMPTS[:2], COMPLETIONS[:2], [[7, 8], [9]], [[13, 1], [14, 15]])
    shared = ClassifierReward(folder, policy_tokenizer=worlds.tokenizer())
    assert shared.shares_ids and shared.inputs(batch) == [[7, 8, 13, 1], [9, 14, 15]]
    # another template: other ids, but a completion that was cut has no end token
    other = ClassifierReward(folder, policy_tokenizer=worlds.tokenizer(template="{{ messages }}"))
    assert not other.shares_ids
    assert [ids[-1] == 1 for ids in other.inputs(batch)] == [True, False]
    assert ClassifierReward(folder).inputs(batch)[1][-1] == 1
    assert not same_tokenizer(worlds.tokenizer(), worlds.tokenizer(encoder=True))


def test_normalizer(tmp_path):
    folder = worlds.reward_folder(tmp_path)
    raw = ClassifierReward(folder).score(TEXT).scores
    with pytest.raises(RewardError, match="normalize is true and .* has no normaliser"):
        ClassifierReward(folder, normalize=True)
    Normalizer.fit(raw, "the five").save(folder)
    scores = ClassifierReward(folder).score(TEXT).scores
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(ClassifierReward(folder, normalize=False).score(TEXT).scores, raw)
    saved = Normalizer.load(folder)
    assert (saved.count, saved.fitted_on) == (5, "the five")


def test_normalizer_errors(tmp_path):
    with pytest.raises(RewardError, match="at least two"):
        Normalizer.fit(torch.ones(1), "one")
    with pytest.raises(RewardError, match="tells nothing apart"):
        Normalizer.fit(torch.full((9,), 3.0), "nine")
    with pytest.raises(RewardError, match="non-finite"):
        Normalizer.fit(torch.tensor([1.0, float("inf")]), "two")
    (tmp_path / "reward_normalizer.json").write_text('{"mean": 1}')
    with pytest.raises(RewardError, match="is not a saved normaliser"):
        Normalizer.load(tmp_path)


def test_length(tmp_path):
    folder = worlds.reward_folder(tmp_path)
    long = RewardBatch(["w1 " * 60 + "w2 "], ["w3 w4"])
    with pytest.raises(RewardError, match="row 0 of the batch: 65 tokens, and the model takes 64"):
        ClassifierReward(folder).score(RewardBatch(["w1 " * 62], ["w3 w4"]))
    assert len(ClassifierReward(folder).inputs(long)[0]) == 64
    short = ClassifierReward(folder, max_length=5).inputs(long)[0]
    assert short == [6 + 1, 6 + 2, 6 + 3, 6 + 4, 1]
    with pytest.raises(RewardError, match="completion alone has 3 tokens, max_length is 2"):
        ClassifierReward(folder, max_length=2).score(long)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tiny.classifier(dtype=torch.float32, vocab_size=12).save_pretrained(tmp_path)
    worlds.tokenizer().save_pretrained(tmp_path)
    reward = ClassifierReward(str(tmp_path), device="cpu")
    assert reward.score(RewardBatch(["w1 "], ["w2"])).scores.shape == (1,)
    with pytest.raises(
        RewardError, match="row 1 of the batch .row 8 of the dataset.: token 26, and the model knows 12"
    ):
        reward.score(RewardBatch(["w1 ", "w2 "], ["w2", "w20"], rows=[3, 8]))


def test_prompts_with_several_completions_are_tokenised_once(tmp_path):
    reward = ClassifierReward(worlds.reward_folder(tmp_path), device="cpu")
    batch = RewardBatch(["w1 ", "w2 ", "w1 ", "w1 "], ["w3", "w4 w5", "w6", "w3"])
    alone = [reward.inputs(take(batch, [i]))[0] for i in range(4)]
    assert reward.inputs(batch) == alone
    seen = []
    encode = type(reward.tokenizer).__call__

    class Counting(type(reward.tokenizer)):
        def __call__(self, text, **options):
            seen.append(text)
            return encode(self, text, **options)

    reward.tokenizer.__class__ = Counting
    assert reward.inputs(batch) == alone and ["w1 ", "w2 "] in seen
    assert reward.score(RewardBatch([], [])).scores.shape == (0,)


def test_a_model_without_a_score_is_refused(tmp_path):
    tiny.causal(dtype=torch.float32).save_pretrained(tmp_path)
    worlds.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is no reward model: it holds no weights for its score"):
        ClassifierReward(str(tmp_path))


def test_non_finite_scores_name_the_rows(tmp_path):
    reward = ClassifierReward(worlds.reward_folder(tmp_path), name="broken")
    with torch.no_grad():
        reward.model.model.embed_tokens.weight[6 + 8] = float("nan")
    with pytest.raises(RewardError, match="'broken' returned a non-finite score .* rows \\[1\\]"):
        reward.score(TEXT)


def test_template_errors_name_the_row(tmp_path):
    with pytest.raises(RewardError, match="no chat template"):
        ClassifierReward(worlds.reward_folder(tmp_path / "a", template=None)).score(CHAT)
    refusing = "{{ raise_exception('only once') if messages | length > 1 else '' }}"
    with pytest.raises(RewardError, match="row 0 of the batch: .*only once"):
        ClassifierReward(worlds.reward_folder(tmp_path / "b", template=refusing)).score(CHAT)
