"""What docs/rewards.md shows works as it stands: specs are built and score, Python runs."""

import re
import shlex
import textwrap
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig

from align.cli.main import build_parser
from align.config.resolve import resolve
from align.config.source import parse_value
from align.errors import ConfigError
from align.evaluation.scoring import reward_specs
from align.modeling.load import load_sequence_classifier
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward, check_reward
from align.reward_models.classifier import ClassifierReward
from align.reward_models.ensemble import save_ensemble
from align.reward_models.normalizer import Normalizer
from align.reward_models.specs import REWARDS, register_reward
from align.trainers.reward import RewardConfig
from tests.modeling import tiny
from tests.reward_models import worlds
from tests.reward_models.test_implicit import saved, saved_adapter
from tests.trainers.test_reward import pairs

DOCS = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
BATCH = RewardBatch(
    ["w1 "],
    ["w2"],
    [[7]],
    [[8, 1]],
    columns={"answer": ["w2"], "tests": ["assert w2 == 1"], "target": ["w2"]},
    groups=[0],
)


def blocks(language):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", DOCS, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(body) for _, body in found]


def block(text):
    (found,) = [body for body in blocks("python") if text in body]
    return found


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The folders and files that the page names, and the server that it shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_TOKEN", "x")
    monkeypatch.setenv("ALIGN_ROLLOUT_KEY", "x")
    members = ["reward_ensemble/member_0", "reward_ensemble/member_1"]
    for name in ("reward", "reward_a", "reward_b", "other_model", *members):
        Path("runs", name).mkdir(parents=True)
        worlds.reward_folder(Path("runs", name))
        if name != "other_model":
            Normalizer(0.0, 1.0, 10, "nothing").save(Path("runs", name))
    save_ensemble("runs/reward_ensemble", ["member_0", "member_1"])
    saved_adapter("runs/dpo_lora", saved("runs/sft"))
    saved("runs/dpo", seed=1)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    load_sequence_classifier("runs/reward", peft_config=lora).save_pretrained("runs/reward_lora")
    worlds.tokenizer().save_pretrained("runs/reward_lora")
    for text, file in (
        ("def brevity", "my_rewards.py"),
        ("def politeness", "judge.py"),
        ("class NearSpec", "my_kinds.py"),
    ):
        Path(file).write_text(block(text))
    with open("judge.py", "a") as file:
        file.write(block("def shorter"))
    names = {"__name__": "score_server"}
    exec(block("class Scorer"), names)
    monkeypatch.setattr(names["Scorer"], "log_message", lambda *args: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), names["Scorer"])
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_every_spec_is_built_and_scores(world):
    kinds = set()
    for text in blocks("yaml"):
        content = yaml.safe_load(text.replace(":8100/", f":{world}/"))
        for spec in [*content.get("rewards", []), *([content["gold_reward"]] if content.get("gold_reward") else [])]:
            check_reward(spec)
            kinds.add(spec["type"])
            if spec["type"] != "vllm":  # test_vllm_server starts its server
                assert build_reward(spec).score(BATCH).scores.shape == (1,)
    assert kinds == {*REWARDS.kinds, "my_kinds.py:NearSpec"}
    assert build_reward("my_rewards.py:contains_answer").score(BATCH).scores.tolist() == [1.0]


def test_what_is_served_is_a_reward(world):
    """The server itself: test_served_reward."""
    commands = [line for body in blocks("bash") for line in body.splitlines() if line.startswith("align serve")]
    for command in commands:
        args, extra = build_parser().parse_known_args(shlex.split(command)[1:])
        (spec,) = reward_specs(args.reward)
        assert not extra and args.config is None and build_reward(spec).score(BATCH).scores.shape == (1,)
    assert len(commands) == 2


def test_the_run_on_verifiable_rewards_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_math.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    (text,) = [body for body in blocks("yaml") if "extends: base/prompts" in body]
    Path("rlvr.yaml").write_text(text)
    (command,) = [body for body in blocks("bash") if "rlvr.yaml" in body]
    assert command.split() == ["align", "grpo", "--config", "rlvr.yaml", "--dry-run"]
    run = resolve("grpo", "rlvr.yaml", [])
    rewards = [build_reward(spec) for spec in run.rewards]
    batch = RewardBatch(["1 + 1?"], [r"It is \boxed{2}."], columns={"answer": ["2"]})
    assert [reward.score(batch).scores.item() for reward in rewards] == [1.0, 1.0]


def test_a_kind_of_your_own_is_checked_and_registered(world):
    with pytest.raises(ConfigError, match="reward.target: input should be greater than 0, not 0"):
        check_reward({"type": "my_kinds.py:NearSpec", "target": 0})
    with pytest.raises(ConfigError, match="unknown key reward.traget of a my_kinds.py:NearSpec reward; .*: target"):
        check_reward({"type": "my_kinds.py:NearSpec", "traget": 40})
    names = {}
    exec(block("class NearSpec"), names)
    register_reward("near")(names["NearSpec"])
    try:
        assert build_reward({"type": "near", "target": 3}).score(BATCH).scores.tolist() == [-1.0]
        with pytest.raises(ConfigError, match="there is a reward of type 'near' already"):
            register_reward("near")(type("Other", (names["NearSpec"],), {}))
        register_reward("near")(names["NearSpec"])  # its cell is run again
    finally:
        del REWARDS.kinds["near"]


def test_python(world, tmp_path):
    names = {}
    exec(block("build_reward({"), names)
    assert names["output"].scores.shape == (1,)
    names = {"batch": RewardBatch(["w1 "] * 3, ["w2", "w3 w4", "w5"])}
    exec(block("Normalizer.fit"), names)
    assert Normalizer.load("runs/other_model").count == 3
    exec(block("export_reward_model"), {})
    exec(block("AutoModelForSequenceClassification"), names)
    ids = torch.tensor([[7, 8, 1]])
    raw = ClassifierReward("runs/reward", normalize=False, device="cpu")
    assert names["model"](input_ids=ids).logits.item() == pytest.approx(raw.score_ids(ids.tolist()).item(), abs=1e-5)
    whole = ClassifierReward("runs/reward_whole", device="cpu").score_ids(ids.tolist())
    torch.testing.assert_close(whole, ClassifierReward("runs/reward_lora", device="cpu").score_ids(ids.tolist()))


def test_training_in_python(world):
    text = block("RewardTrainer(").replace("Qwen/Qwen2.5-0.5B", "runs/sft")
    text = text.replace(
        'output_dir="runs/reward"', 'output_dir="runs/reward", max_steps=1, report_to="none", use_cpu=True'
    )
    names = {"train_pairs": pairs(8), "eval_pairs": pairs(4, seed=1)}
    exec(text, names)
    assert Normalizer.load("runs/reward").count == 8
    assert tiny.PAD == names["trainer"].processing_class.pad_token_id


def test_what_is_named_exists():
    ensembles = (Path(__file__).parents[2] / "docs" / "ensembles.md").read_text(encoding="utf-8")
    for kind, spec in REWARDS.kinds.items():
        assert f"## type: {kind}" in DOCS
        text = DOCS + ensembles if kind == "ensemble" else DOCS
        for key in spec.keys():
            assert re.search(rf"`{key}`|[{{ ]{key}:[ \n]", text), f"{key} of {kind} is not documented"
    for option in ("center_rewards_coefficient", "score_l2_coefficient", "normalizer_pairs"):
        assert option in DOCS and option in RewardConfig.__dataclass_fields__
    (example,) = blocks("json")
    assert Normalizer(**parse_value(example)).count == 4000
