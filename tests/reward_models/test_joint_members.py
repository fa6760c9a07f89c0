"""Members that share a model are saved, loaded and scored as separate ones would be."""

import json

import pytest
import torch
from peft import LoraConfig

from align.errors import ConfigError, RewardError
from align.modeling.load import load_sequence_classifier, load_tokenizer
from align.modeling.member_lora import adapter_parameters, add_member_adapters
from align.modeling.members import Members, member_state, share_trunk
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward, check_reward
from align.reward_models.classifier import ClassifierReward
from align.reward_models.ensemble import RewardEnsemble, load_ensemble, models_held, save_ensemble
from align.reward_models.joint import save_adapters, save_trunk
from align.reward_models.normalizer import Normalizer
from tests.modeling import tiny
from tests.reward_models import worlds

BATCH = RewardBatch(["w1 w2 ", "w3 ", "w4 ", "w5 w6 w7 "], ["w7", "w8 w9 w10 w11", "w2 w2", "w1"])
NAMES = ["member_0", "member_1", "member_2"]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def randomised(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            p += 0.3 * torch.randn(p.shape, generator=generator)


def finish(folder, kind, **details):
    for i, name in enumerate(NAMES):
        (folder / name).mkdir(exist_ok=True)
        Normalizer(0.5 * i, 1.0 + i, 10, "a test").save(folder / name)
    save_ensemble(folder, NAMES, kind=kind, **details)
    return folder


def by_hand(folder):
    """An ensemble that its user has changed, and said so."""
    path = folder / "ensemble.json"
    saved = json.loads(path.read_text())
    del saved["files"]
    path.write_text(json.dumps(saved))
    return folder


@pytest.fixture(params=["llama", "bert"])
def trunk(request, tmp_path):
    """(folder of the ensemble, its members as plain classifiers)."""
    kind = request.param
    plain = tiny.classifier(kind, dtype=torch.float32, num_hidden_layers=3)
    joint = share_trunk(plain, [1, 2, 3], 1)
    randomised(p for module in joint.modules() if isinstance(module, Members) for p in module.parameters())
    folder = tmp_path / "rm"
    save_trunk(joint, folder)
    worlds.tokenizer(encoder=kind == "bert").save_pretrained(folder)
    alone = []
    for i in range(3):
        model = tiny.classifier(kind, dtype=torch.float32, num_hidden_layers=3)
        model.load_state_dict(member_state(joint.state_dict(), i))
        alone.append(ClassifierReward(model, tokenizer=load_tokenizer(folder), device="cpu"))
    return finish(folder, "shared_trunk", upper_layers=1), alone


@pytest.fixture
def adapters(tmp_path):
    """(folder of the ensemble, its members as plain classifiers)."""
    base, folder = worlds.reward_folder(tmp_path / "base"), tmp_path / "rm"
    joint = add_member_adapters(load_sequence_classifier(base), LORA, [1, 2, 3])
    randomised(adapter_parameters(joint))
    save_adapters(joint, [folder / name for name in NAMES], LORA, worlds.tokenizer())
    alone = [ClassifierReward(str(folder / name), device="cpu", normalize=False) for name in NAMES]
    return finish(folder, "lora"), alone


def check(ensemble, raw, alone):
    for i, member in enumerate(alone):
        expected = member.score(BATCH).scores
        torch.testing.assert_close(raw.score(BATCH).extras[f"member/{i}"], expected, rtol=0, atol=1e-5)
        normalised = ensemble.score(BATCH).extras[f"member/{i}"]
        torch.testing.assert_close(normalised, (expected - 0.5 * i) / (1 + i), rtol=0, atol=1e-5)
    output = ensemble.score(BATCH)
    torch.testing.assert_close(output.scores, output.extras["members_mean"] - 0.5 * output.extras["variance"])


def test_a_shared_trunk(trunk):
    folder, alone = trunk
    ensemble = load_ensemble(folder, "uwo", lambda_=0.5, device="cpu", batch_tokens=16)
    check(ensemble, load_ensemble(folder, "wco", normalize=False, device="cpu"), alone)
    assert ensemble.name == "rm" and len(ensemble.members) == 3 and models_held(folder) == [folder]


def test_adapters(adapters):
    folder, alone = adapters
    ensemble = load_ensemble(folder, "uwo", lambda_=0.5, device="cpu", batch_tokens=16)
    check(ensemble, load_ensemble(folder, "wco", normalize=False, device="cpu"), alone)
    assert models_held(folder) == [folder / "member_0"]


def test_the_policys_ids_are_scored_as_they_are(adapters):
    ensemble = load_ensemble(adapters[0], "mean", policy_tokenizer=worlds.tokenizer(), device="cpu")
    ids = RewardBatch(["no", "no"], ["words", "here"], [[7, 8], [9]], [[10, 1], [11, 12, 1]])
    text = RewardBatch(["w1 w2 ", "w3 "], ["w4", "w5 w6"])
    torch.testing.assert_close(ensemble.score(ids).scores, ensemble.score(text).scores, rtol=0, atol=1e-5)


def test_a_member_that_fails_is_named(trunk):
    ensemble = load_ensemble(trunk[0], "mean", device="cpu")
    with torch.no_grad():
        for name, p in ensemble.members.classifier.model.named_parameters():
            if ".members.1." in name:
                p.fill_(float("nan"))
    with pytest.raises(RewardError, match="member_1 returned a non-finite score .nan. for rows \\[0, 1, 2, 3\\]"):
        ensemble.score(BATCH)


def test_members_of_one_training_must_read_the_same(adapters):
    folder = by_hand(adapters[0])
    worlds.tokenizer(template="{{ messages }}").save_pretrained(folder / "member_2")
    with pytest.raises(ConfigError, match="'member_2' has another chat template or end token than member 'member_0'"):
        load_ensemble(folder, "mean", device="cpu")
    worlds.tokenizer(encoder=True).save_pretrained(folder / "member_1")
    with pytest.raises(ConfigError, match="'member_1' has another vocabulary than member 'member_0'"):
        load_ensemble(folder, "mean", device="cpu")


def test_listed_members_may_be_of_several_families(tmp_path):
    """Each reads the same texts through its own tokenizer: models of other makers err apart, which ensembles need."""
    one = ClassifierReward(worlds.reward_folder(tmp_path / "one"), device="cpu", name="one")
    other = ClassifierReward(worlds.reward_folder(tmp_path / "two", kind="bert"), device="cpu", name="two")
    assert one.tokenizer.get_vocab() != other.tokenizer.get_vocab()
    apart = torch.stack([member.score(BATCH).scores for member in (one, other)])
    assert torch.equal(RewardEnsemble([one, other], "mean").score(BATCH).scores, apart.mean(0))
    wco = RewardEnsemble([one, other], "wco", normalize=False)
    assert torch.equal(wco.score(BATCH).scores, apart.amin(0))


def test_adapters_that_do_not_belong_together(adapters):
    folder = by_hand(adapters[0])
    path = folder / "member_1" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 99}))
    with pytest.raises(ConfigError, match="member_1 and .*member_0 are adapters with different options"):
        load_ensemble(folder, "mean", device="cpu")
    path.write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    with pytest.raises(ConfigError, match="member_1 adapts elsewhere"):
        load_ensemble(folder, "mean", device="cpu")


def test_damaged(trunk):
    folder, _ = trunk
    (folder / "member_1" / "reward_normalizer.json").unlink()
    with pytest.raises(RewardError, match="normalize is true and member_1 has no normaliser"):
        load_ensemble(folder, "mean", device="cpu")
    save_ensemble(folder, NAMES[:2], kind="shared_trunk", upper_layers=1)
    with pytest.raises(RewardError, match="does not hold 2 members of 1 layers"):
        load_ensemble(folder, "mean", device="cpu", normalize=False)
    by_hand(folder)
    (folder / "shared_trunk.safetensors").unlink()
    with pytest.raises(RewardError, match="has no shared_trunk.safetensors"):
        load_ensemble(folder, "mean", device="cpu", normalize=False)


def test_from_a_configuration(adapters):
    folder, _ = adapters
    spec = {"type": "ensemble", "path": str(folder), "aggregation": "lcb", "lambda": 1.0, "ddof": 1}
    output = build_reward(spec, tokenizer=worlds.tokenizer(), device="cpu").score(BATCH)
    torch.testing.assert_close(output.scores, output.extras["members_mean"] - output.extras["variance"].sqrt())
    check_reward(spec)
    with pytest.raises(ConfigError, match="quantile belongs to aggregation quantile; lcb has none"):
        build_reward({**spec, "quantile": 0.1})
    with pytest.raises(RewardError, match="the completion alone has 3 tokens, max_length is 2"):
        long = RewardBatch(["w1 w2 w3 w4 "], ["w5 w6"])
        build_reward({**spec, "max_length": 2}, device="cpu").score(long)
    with pytest.raises(ConfigError, match="max_length of an ensemble belong to path"):
        build_reward({"type": "ensemble", "members": ["json:dumps"] * 2, "aggregation": "mean", "max_length": 9})
