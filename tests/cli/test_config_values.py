"""Values out of range, secrets, and thousands of small damages: always one line with its place, never a traceback."""

import dataclasses
import math
import pickle
from typing import get_args

import numpy as np
import pytest
import torch

from align.cli.main import main
from align.config.arguments import hints, instead_of, option_classes
from align.config.ranges import RANGES
from align.config.resolve import resolve, settings, write_settings
from align.config.secrets import MASK, Secret, expand, masked, masked_text
from align.errors import ConfigError
from align.methods import METHODS
from align.rollout import VLLMOptions
from align.trainers.dpo import DPOConfig
from align.trainers.ppo import PPOConfig

BASE = "model_name_or_path: some/model\ndataset_name: rows.jsonl\nuse_cpu: true\n"
REWARDS = "rewards: [json:dumps]\n"


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(BASE + text)
        return str(path)

    return write


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_numeric_option_has_a_range(method):
    for cls in option_classes(method).values():
        for field in dataclasses.fields(cls):
            hint = hints(cls)[field.name]
            if instead_of(field):  # TRL's name for something else: any value but the default is refused
                continue
            if field.init and {int, float} & set(get_args(hint) or (hint,)):
                assert field.name in RANGES, field.name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: -1", "learning_rate must be at least 0, got -1"),
        ("learning_rate: .inf", "learning_rate must be a finite number, got inf"),
        ("learning_rate: .nan", "learning_rate must be a finite number, got nan"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size must be at least 1, got 0"),
        ("lora_r: 0", "lora_r must be at least 1, got 0"),
        ("adam_beta1: 1.5", "adam_beta1 must be at least 0 and below 1, got 1.5"),
        ("weight_decay: -1", "weight_decay must be at least 0, got -1"),
        ("warmup_steps: 1e30", "warmup_steps must be at least 0 and at most 1e+12, got 1e+30"),
        ("seed: 4294967296", "seed must be at least 0 and at most 4.29497e+09, got 4.29497e+09"),
        ("reward_clip: -1", "reward_clip must be above 0, got -1"),
        ("temperature: 0", "temperature must be at least 0.01, got 0"),
        ("temperature: 3", "temperature must be at least 0.01 and at most 2, got 3"),
        ("reward_weights: [1.0, .nan]", "reward_weights must be a finite number, got nan"),
        ("epsilon: 0", "epsilon must be above 0, got 0"),
        ("kl_in: los", "kl_in must be one of reward, loss, got 'los'"),
        ("rollout: {backend: vllm, gpu_memory_utilization: 2}", "rollout.gpu_memory_utilization: input should be less"),
        ("rollout.max_num_seqs: 0", "rollout.max_num_seqs: input should be greater"),
        ("n_samples_per_prompt: 4", "unknown key n_samples_per_prompt; it is num_generations here"),
        (
            "gpu_memory_utilization: 0.5",
            "unknown key gpu_memory_utilization; it is rollout.gpu_memory_util",
        ),
        ("constraints: [{reward: a, direction: equal, threshold: .inf}]", "constraints.0.threshold: input should"),
        (
            "rewards:\n  - {type: remote, url: http://x, timeout: 0}",
            "rewards.0.timeout: input should be",
        ),
    ],
)
def test_a_value_that_a_later_stage_would_refuse(file, line, message):
    text = line + "\n" + ("" if "rewards:" in line else REWARDS)
    path = file(text)
    with pytest.raises(ConfigError) as error:
        resolve("remax", path, [])
    number = 5 if line.startswith("rewards:") else 4
    assert str(error.value).startswith(f"{path}, line {number}: {message}")


def test_rollout_options_of_a_file_and_a_command_line_are_one_section(file, tmp_path):
    path = file("rollout:\n  backend: vllm\n  gpu_memory_utilization: 0.5\n" + REWARDS)
    run = resolve("remax", path, ["--rollout.dtype", "float32"])
    assert run.training.rollout == VLLMOptions(gpu_memory_utilization=0.5, dtype="float32")
    assert run.training.to_dict()["rollout"] == settings(run)["rollout"] == run.training.rollout.given()
    write_settings(settings(run), tmp_path / "again.yaml")
    assert resolve("remax", str(tmp_path / "again.yaml"), []).training.rollout == run.training.rollout
    assert resolve("remax", path, ["--rollout", "transformers"]).training.rollout.backend == "transformers"


@pytest.mark.parametrize("number", [np.int64(3), np.float32(3), torch.tensor(3)])
def test_numbers_of_numpy_and_torch_are_pythons(number, tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=number, learning_rate=number)
    assert (type(args.per_device_train_batch_size), args.per_device_train_batch_size) == (int, 3)
    assert type(args.learning_rate) in (int, float) and args.learning_rate == 3


def test_python_is_held_to_the_same(tmp_path):
    for options, message in (
        ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number"),
        (
            {"max_prompt_length": None},
            "max_prompt_length must be a whole number, got None: leave it out for its default",
        ),
        ({"num_generations": 2.5}, "num_generations must be a whole number, got 2.5"),
        ({"learning_rate": "1e-4"}, "learning_rate must be a number, got '1e-4' .str."),
        ({"per_device_train_batch_size": []}, "per_device_train_batch_size must be a whole number, got .. .list."),
        ({"max_steps": 1.5}, "max_steps must be a whole number, got 1.5"),
        ({"eval_num_generations": 2, "num_generations_eval": 3}, "num_generations_eval is TRL's name of eval_num"),
        ({"rollout": {"max_num_seqs": 0}}, "rollout.max_num_seqs: "),
        (
            {"constraints": [{"reward": "a", "direction": "up", "threshold": 0}]},
            "constraints.0.direction: ",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            PPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, num_generations=8 / 2, save_steps=0.5)
    assert (repr(args.num_generations), args.save_steps) == ("4", 0.5)


# ---- secrets --------------------------------------------------------------------------------------------------------


def test_what_is_masked():
    headers = {
        "Authorization": "Bearer abc",
        "X-Key": "${KEY}",
        "Accept": "a/b",
        "B": "Bearer $TOKEN",
        "C": "a$b",
    }
    assert masked({"url": "https://me:pw@host/score?key=1&model=a", "headers": headers}) == {
        "url": f"https://{MASK}@host/score?key={MASK}&model=a",
        "headers": {"Authorization": MASK, "X-Key": "${KEY}", "Accept": "a/b", "B": "Bearer $TOKEN", "C": MASK},
    }
    assert masked_text("see http://a:${PASSWORD}@b/c?token=$T or http://a:b@c") == (
        f"see http://a:${{PASSWORD}}@b/c?token=$T or http://{MASK}@c"
    )
    assert masked("hf_abc", "hub_token") == MASK and masked("${HF}", "hub_token") == "${HF}"


def test_no_secret_is_written_and_a_masked_one_is_refused(file, tmp_path):
    path = file(
        "hub_token: hf_abc\nrewards:\n  - {type: remote, url: 'http://u:pw@h/x?api_key=k9', headers: {A: s7}}\n"
    )
    written = tmp_path / "align_config.yaml"
    write_settings(settings(resolve("remax", path, [])), written)
    text = written.read_text()
    assert not any(secret in text for secret in ("hf_abc", "pw", "k9", "s7"))
    with pytest.raises(ConfigError, match=r"align_config.yaml, line \d+: hub_token was masked .* as \$\{NAME\}"):
        resolve("remax", str(written), [])


def test_a_reference_to_the_environment_is_kept_and_read_late(file, monkeypatch, tmp_path):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    run = resolve("dpo", file("hub_token: ${MY_TOKEN}\n"), [])
    assert settings(run)["hub_token"] == "${MY_TOKEN}"
    with pytest.raises(ConfigError, match="hub_token needs the environment variable MY_TOKEN, not set"):
        expand(run.training.hub_token, "hub_token")
    monkeypatch.setenv("MY_TOKEN", "hf_abc")
    assert expand(run.training.hub_token, "hub_token") == "hf_abc"


def test_a_token_is_not_in_the_saved_arguments(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), hub_token="hf_abc", use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_abc" not in (tmp_path / "training_args.bin").read_bytes()
    assert args.hub_token == "hf_abc" and "hf_abc" not in repr(Secret("hf_abc"))
    assert pickle.loads(pickle.dumps(args.hub_token)) == MASK


def test_commands_that_are_printed_hold_no_secret(file, capsys, tmp_path):
    path = file("method: dpo\n")
    tokens = ["--num-processes", "2", "--hub_token", "hf_abc"]
    assert main(["launch", path, "--dry-run", *tokens]) == 0
    assert "hf_abc" not in capsys.readouterr().out
    assert main(["launch", path, "--slurm", str(tmp_path / "job"), *tokens]) == 2
    assert "would hold a secret" in capsys.readouterr().err and not (tmp_path / "job").exists()


def test_the_temperature_is_the_engines():
    from align.rollout.types import MAX_TEMPERATURE, MIN_TEMPERATURE

    assert RANGES["temperature"] == (MIN_TEMPERATURE, True, MAX_TEMPERATURE, True)
