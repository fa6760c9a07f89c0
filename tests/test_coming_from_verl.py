"""docs/coming_from_verl.md: what its last columns name exists here, its batch is the one it says, its rewards score."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from align import RewardBatch, build_reward
from align.config.options import options_of
from align.config.other_names import ELSEWHERE, OTHER_NAMES
from align.config.resolve import resolve
from align.errors import ConfigError
from align.methods import METHODS

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from_verl.md").read_text(encoding="utf-8")
ON_POLICY = ("remax", "ppo", "rloo", "grpo", "reinforce_pp")
OF_ON_POLICY = {option for method in ON_POLICY for option in options_of(method)}
VALUES = {
    "k2",
    "k3",
    "sequence_mean",
    "sequence_sum",
    "constant",
    "token_truncate",
    "sequence_truncate",
    "token_mask",
    "constant_with_warmup",
}  # of the option that the row before names


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.S | re.M)


def last_column(section: str) -> list[str]:
    rows = re.findall(r"^\| .*\|$", PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0], flags=re.M)
    return [row.rstrip(" |").rpartition(" | ")[2] for row in rows[1:]]


@pytest.mark.parametrize("section", ["Batch sizes", "Options"])
def test_the_last_column_names_options(section):
    named = {name for cell in last_column(section) for name in re.findall(r"`(\w+)", cell)}
    assert len(named) > 5 and named - OF_ON_POLICY <= VALUES


def test_the_methods_are_commands():
    commands = [re.findall(r"`align (\w+)(?: --(\w+))?", cell)[0] for cell in last_column("The method is the command")]
    assert {method for method, _ in commands} == set(ON_POLICY)
    assert all(not option or option in options_of(method) for method, option in commands)


def test_the_defaults_are_those_of_the_page():
    def default(option: str) -> dict:
        return {method: options_of(method)[option].get("default") for method in ON_POLICY}

    aggregation = {"remax": "sequence_sum", "rloo": "sequence_sum", "grpo": "sequence_mean"}
    assert default("loss_aggregation") == aggregation | {"ppo": "token_mean", "reinforce_pp": "token_mean"}
    assert default("kl_in") == dict.fromkeys(ON_POLICY, "reward") | {"grpo": "loss"}
    assert default("beta") == dict.fromkeys(ON_POLICY, 0.05)
    assert default("num_iterations") == dict.fromkeys(ON_POLICY, 1) | {"ppo": 4}
    assert default("dual_clip") == dict.fromkeys(ON_POLICY)
    ppo = options_of("ppo")
    schedule = [ppo[name]["default"] for name in ("lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2")]
    assert schedule == ["linear", 0, 0.0, 0.999]
    assert ppo["lam"]["default"] == 0.95 and "default" not in ppo["value_clip"]


def test_the_batch_is_that_of_verl(tmp_path):
    file = tmp_path / "my_grpo.yaml"
    file.write_text(blocks("yaml")[0])
    args = resolve("grpo", str(file), []).training
    assert args.train_batch_size * args.gradient_accumulation_steps * 8 == 256
    assert args.prompts_per_rollout * 8 == 1024 and args.steps_per_rollout == 4
    assert args.num_generations == 5
    assert (args.loss_aggregation, args.beta, args.kl_in) == ("token_mean", 0.001, "loss")
    assert (args.max_steps, args.num_train_epochs, args.lr_scheduler_type) == (-1, 15, "constant")


def test_rewards_of_the_other_libraries_score(tmp_path, monkeypatch):
    theirs = {"my_score": ModuleType("my_score"), "my_openrlhf_reward": ModuleType("my_openrlhf_reward")}

    def compute_score(solution_str, ground_truth, data_source, extra_info):  # in an order of its own: verl names them
        score = float(solution_str == ground_truth) + extra_info["index"]
        return {"score": score, "acc": score > 0} if extra_info["index"] else score

    theirs["my_score"].compute_score = compute_score
    theirs["my_openrlhf_reward"].reward_func = lambda queries, prompts, labels: {
        "rewards": [float(q[len(p) :] == label) for q, p, label in zip(queries, prompts, labels, strict=True)]
    }
    for name, module in theirs.items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "page_rewards.py").write_text("\n".join(blocks("python")))
    columns = {
        "data_source": ["gsm8k"] * 2,
        "reward_model": [{"style": "rule", "ground_truth": "4"}] * 2,
        "extra_info": [{"index": 0}, {"index": 2}],
        "label": ["4"] * 2,
    }
    asked = [[{"role": "user", "content": "2 + 2?"}]] * 2
    answers = [[{"role": "assistant", "content": text}] for text in ("4", "5")]
    batch = RewardBatch(asked, answers, columns=columns)
    for function, scores in (("verl_score", [1.0, 2.0]), ("openrlhf_score", [1.0, 0.0])):
        reward = build_reward({"type": "rule", "function": f"{tmp_path}/page_rewards.py:{function}"})
        assert reward.score(batch).scores.tolist() == scores
    texts = RewardBatch(["2 + 2?"] * 2, ["4", "5"], columns={"label": ["4"] * 2})
    assert reward.score(texts).scores.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("target_kl", "kl_target, in nats per completion: verl's is per token"),
        ("save_freq", "save_steps, in optimiser steps: num_mini_batches x num_iterations"),
        ("ppo_mini_batch_size", "an optimiser step has per_device_train_batch_size x gradient_accumulation_steps"),
        ("kl_loss_type", "it is kl_estimator here"),
        ("clip_ratio_low", "it is epsilon here"),
        ("adv_estimator", "the method is the command"),
        ("freezing_actor_steps", "critic_warmup_steps (PPO), in optimiser steps: num_mini_batches x num_iterations"),
        ("gamma_beta_ratio", "simpo_gamma, which is the margin itself: gamma_beta_ratio x beta"),
        ("dataset_mixer", "datasets: [{path: ..., weight: ...}, ...]"),
        ("lambda_init", "constraints, with multipliers: {form: softplus"),
    ],
)
def test_names_whose_meaning_differs_are_answered_with_it(name, said, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: 1\n")
    with pytest.raises(ConfigError, match=f"unknown key {name}; (it is|no option here).*") as error:
        resolve("ppo", str(file), [])
    assert said in str(error.value)


def test_what_counts_rollouts_elsewhere_is_said():
    """OpenRLHF's `global_steps > critic.freezing_steps` and verl's `critic_warmup <= global_steps` are of rollouts."""
    counted = PAGE.split("prints this arithmetic. ")[1].split(" count rollouts;")[0]
    assert all(f"`{name}`" in counted for name in ("critic_warmup", "critic.freezing_steps", "lr_warmup_steps"))


def test_a_target_of_the_kl_is_per_completion():
    """verl and OpenRLHF hold the mean over tokens; the page says to multiply."""
    help_text = options_of("ppo")["kl_target"]["help"]
    assert "KL per sequence" in help_text and "here it is per answer" in PAGE


def test_other_names_lead_to_options():
    every = {option for method in METHODS for option in options_of(method)}
    assert not OTHER_NAMES.keys() & every
    assert not ELSEWHERE.keys() & every
    arguments = {"processing_class"}  # of trainers
    assert {name.partition(".")[0] for name in OTHER_NAMES.values()} <= every | arguments
