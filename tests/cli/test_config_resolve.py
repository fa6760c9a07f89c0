"""Files and command lines become typed configs; every mistake is one line with its place."""

from pathlib import Path

import pytest
import torch
import yaml

from align.cli.build import peft_config
from align.cli.main import main
from align.config import configs_dir
from align.config.resolve import read_entries, resolve, settings, write_settings
from align.config.source import read_file
from align.errors import ConfigError
from align.methods import get_method

BASE = "model_name_or_path: some/model\ndataset_name: rows.jsonl\n"


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(BASE + text)
        return str(path)

    return write


def refusal(method, path, *tokens) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(method, path, list(tokens))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_command_line_over_file_over_default(file):
    path = file("learning_rate: 1e-5\nseed: 7\n")
    run = resolve("sft", path, ["--learning_rate", "5e-7", "--use_peft", "--lora-r", "8"])
    assert (run.training.learning_rate, run.training.seed, run.model.lora_r) == (5e-7, 7, 8)
    assert run.training.max_grad_norm == 1.0
    assert (run.where("learning_rate"), run.where("seed")) == ("command line", f"{path}, line 4")
    assert run.where("max_grad_norm") == "default"


def test_epochs_over_a_file_with_max_steps_are_refused(file, tmp_path):
    """transformers lets max_steps decide: `extends: grpo` with num_train_epochs: 15 ended after 400 steps."""
    (tmp_path / "base.yaml").write_text(f"{BASE}max_steps: 400\n")
    own = tmp_path / "own.yaml"
    own.write_text("extends: base.yaml\nnum_train_epochs: 15\n")
    error = refusal("sft", str(own))
    assert error.startswith(f"{own}, line 2: num_train_epochs does nothing beside max_steps: 400 ({tmp_path}/base.yaml")
    assert error.endswith("add max_steps: -1 to train by epochs, or leave num_train_epochs out")
    with pytest.raises(ConfigError, match="does nothing beside max_steps"):
        read_entries(get_method("sft"), str(own), [])  # all that `align launch` reads
    assert resolve("sft", str(own), ["--max_steps", "-1"]).training.num_train_epochs == 15
    assert resolve("sft", str(own), ["--max_steps", "2"]).training.max_steps == 2  # said last, or beside it
    assert resolve("sft", file("num_train_epochs: 2\nmax_steps: 3\n"), []).training.max_steps == 3
    assert "command line: num_train_epochs" in refusal("sft", file("max_steps: 3\n"), "--num_train_epochs", "2")


@pytest.mark.parametrize(
    ("line", "part", "value"),
    [
        ("learning_rate: 5e-7", "training", 5e-7),
        ("learning_rate: 1", "training", 1.0),
        ("max_steps: 1e3", "training", 1000),
        ("bf16: no", "training", False),
        ("bf16: false", "training", False),
        ("use_peft: yes", "model", True),
        ("run_name: 007", "training", "007"),
        ("run_name: true", "training", "true"),
        ("eval_strategy: no", "training", "no"),
        ("report_to: none", "training", []),
        ("report_to: [wandb, tensorboard]", "training", ["wandb", "tensorboard"]),
        ("lr_scheduler_kwargs: {last_epoch: -1}", "training", {"last_epoch": -1}),
        ("lora_target_modules: all-linear\nuse_peft: true", "model", "all-linear"),
        ("lora_target_modules: [q_proj, v_proj]\nuse_peft: true", "model", ["q_proj", "v_proj"]),
        ("resume_from_checkpoint: true", "training", "true"),
        ("dtype: bfloat16", "model", "bfloat16"),
        ("disable_tqdm: null", "training", False),
        ("max_bad_share: 0.1", "training", 0.1),
    ],
)
def test_the_type_comes_from_the_field(file, line, part, value):
    run = resolve("sft", file(line), [])
    key = line.partition(":")[0]
    assert getattr(getattr(run, part), key) == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learing_rate: 0.5", "unknown key learing_rate; nearest valid: learning_rate"),
        ("zzzzz: 1", "unknown key zzzzz; see `align sft --help`"),
        ("cutoff_len: 512", "unknown key cutoff_len; it is max_length here"),
        ("torch_dtype: bfloat16", "unknown key torch_dtype; it is dtype here"),
        ("warmup_ratio: 0.1", "unknown key warmup_ratio; no option here. Instead: warmup_steps, below 1 a share"),
        (
            "val_size: 0.1",
            'unknown key val_size; no option here. Instead: a part of the rows: dataset_train_split: "train[:-500]"',
        ),
        ("rewards: [x]", "unknown key rewards; an option of modpo, remax, ppo, rloo"),
        ("learning_rate: fast", "learning_rate: input should be a valid number"),
        ("learning_rate: true", "learning_rate: input should be a number"),
        ("learning_rate: [1]", "learning_rate: input should be a valid number"),
        ("max_steps: 1.5", "max_steps: input should be a valid integer"),
        ("seed: null", "seed: input should be a valid integer"),
        ("bf16: maybe", "bf16: input should be a valid boolean"),
        ("run_name: {a: 1}", "run_name: input should be a valid string"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type cannot be 'cosin'; valid: linear, cosine"),
        ("optim: adamw_torch_fuse", "optim cannot be 'adamw_torch_fuse'; nearest valid: adamw_torch_fused"),
        ("dtype: float8", "dtype cannot be 'float8'; valid: auto, bfloat16"),
        ("method: reward", "a file for `align reward`, the command is `align sft`"),
        (r'method: "\x00"', r"a file for `align \x00`, the command is"),
    ],
)
def test_mistakes_in_a_file_are_one_line_with_the_place(file, line, message):
    path = file(line + "\n")
    assert refusal("sft", path).startswith(f"{path}, line 3: {message}")


def test_mistakes_on_the_command_line(file):
    path = file("")
    assert refusal("sft", path, "--learing-rate", "1") == (
        "command line: unknown key --learing_rate; nearest valid: --learning_rate"
    )
    assert refusal("sft", path, "--seed", "x").startswith("command line: seed: input should be a valid integer")


def test_bf16_without_a_gpu_says_what_to_do(file, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    path = file("bf16: true\n")
    assert refusal("sft", path).startswith(f"{path}, line 3: bf16: no GPU is found on this machine. Leave bf16 out")
    assert resolve("sft", path, ["--use_cpu", "true", "--model_name_or_path", "m", "--dataset_name", "d"]).training.bf16


def test_all_unknown_keys_are_named_in_the_one_line(file):
    message = refusal("sft", file("learing_rate: 1\nwarmup_step: 2\n"))
    assert "line 3: unknown key learing_rate" in message and "line 4: unknown key warmup_step" in message


def test_what_the_constructors_refuse_is_one_line_too(file):
    path = file("eval_strategy: steps\neval_steps: 5\nsave_steps: 7\nload_best_model_at_end: true\n")
    assert refusal("sft", path).startswith(f"{path}, line 6: --load_best_model_at_end requires")
    assert "max_bad_share" in refusal("sft", file("max_bad_share: 2\n"))


def test_what_is_missing_is_named():
    assert refusal("sft", None) == (
        "`align sft` needs model_name_or_path and dataset_name, to be set on the command line or in a --config"
    )
    tokens = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl"]
    assert "`align remax` needs rewards" in refusal("remax", None, *tokens)


def test_rewards_are_nested_and_can_be_overridden(file):
    path = file("rewards:\n  - {type: classifier, path: a, name: proxy}\ngold_reward: gold.py:score\n")
    run = resolve("remax", path, ["--rewards.0.path", "b", "--learning_rate", "5e-7"])
    assert [spec.given() for spec in run.rewards] == [{"type": "classifier", "path": "b", "name": "proxy"}]
    assert run.gold_reward.given() == {"type": "rule", "function": "gold.py:score"}
    assert run.training.learning_rate == 5e-7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  - a.py:f\n  - type: rule\n    function: b\n    nam: c\n", "line 7: unknown key rewards.1.nam of a rule"),
        ("  - {type: classifier, name: a}\n", "line 4: rewards.0: a classifier reward needs 'path'"),
        ("  - {type: clasifier, path: a}\n", "line 4: rewards.0: type must be one of judge, "),
        (
            "  type: ensemble\n  aggregation: mean\n  members:\n    - path: a\n      typ: classifier\n",
            "line 7: rewards.members.0: type must be one of",
        ),
    ],
)
def test_reward_specs_are_checked_with_their_lines(file, text, message):
    path = file("rewards:\n" + text)
    assert f"{path}, {message}" in refusal("remax", path)


def test_a_reward_key_from_the_command_line(file):
    path = file("rewards:\n  - {type: classifier, path: a}\n")
    message = refusal("remax", path, "--rewards.0.nam", "x")
    assert message == "command line: unknown key rewards.0.nam of a classifier reward; nearest valid: name"


def test_settings_are_written_and_read_back(file, tmp_path):
    tokens = "--rewards.0.path b --learning_rate 5e-7 --lr_scheduler_type cosine --report_to none --max_steps 1e3"
    run = resolve("remax", file("rewards:\n  - {type: classifier, path: a}\nrun_name: 007\n"), tokens.split())
    path = tmp_path / "align_config.yaml"
    write_settings(settings(run), path)
    again = resolve("remax", str(path), [])
    assert settings(again) == settings(run)
    assert again.training.to_dict() | {"logging_dir": None} == run.training.to_dict() | {"logging_dir": None}
    written = yaml.safe_load(path.read_text())
    assert written["method"] == "remax" and written["bf16"] is run.training.bf16  # what the machine decided is kept


@pytest.mark.parametrize("path", sorted(configs_dir().glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_resolves(path: Path):
    method = read_file(path)["method"].value
    run = resolve(method, str(path), [])
    assert run.training.output_dir == f"runs/{path.stem}"
    assert main(["launch", str(path), "--num-processes", "8", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("method", "tokens", "dropout"),
    [
        ("dpo", [], 0.0),
        ("dpo", ["--lora_dropout", "0.1"], 0.1),
        ("dpo", ["--disable_dropout", "no"], 0.05),
        ("sft", [], 0.05),
    ],
)
def test_the_default_dropout_of_an_adapter_is_not_one_that_is_switched_off(method, tokens, dropout, file):
    assert (
        peft_config(resolve(method, file(""), ["--output_dir", "run", "--use_peft", *tokens])).lora_dropout == dropout
    )
