"""`align sft`, `align reward` and `align remax` from the command line: what they train, save and resume."""

import json
from pathlib import Path

import pytest

from align.cli.dry_run import steps_text
from align.cli.main import main
from align.cli.train import SETTINGS_FILE, resume_from
from align.config.resolve import resolve, settings

SMALL = "--per_device_train_batch_size 3 --gradient_accumulation_steps 2 --learning_rate 1e-3 --use_cpu --seed 3"


def train(method, output_dir, *arguments) -> Path:
    assert main([method, *map(str, arguments), "--output_dir", str(output_dir), *SMALL.split()]) == 0
    return output_dir


def state(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def test_sft_trains_saves_and_resumes(tiny_model, demonstrations, tmp_path, capsys):
    base = ["--model_name_or_path", tiny_model, "--dataset_name", demonstrations, "--max_length", 64]
    base += ["--save_steps", 1, "--eval_strategy", "epoch", "--eval_dataset_name", demonstrations]
    base += ["--dataset_test_split", "train[:4]", "--num_train_epochs", 2, "--logging_steps", 1]
    folder = train("sft", tmp_path / "run", *base)
    assert str(folder) in capsys.readouterr().out
    run = resolve("sft", str(folder / SETTINGS_FILE), [])
    assert settings(run)["seed"] == 3 and settings(run)["dataset_test_split"] == "train[:4]"
    whole = state(folder / "checkpoint-4")
    # the dry run counted the steps that the trainer did
    assert f"-> {whole['max_steps']} optimiser steps" in steps_text(run, 12, 1)
    assert [entry["step"] for entry in whole["log_history"] if "eval_loss" in entry] == [2]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    first = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name in ("checkpoint-4", "checkpoint-3"):
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()
    train("sft", folder, *base, "--resume_from_checkpoint", "auto")
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all((first[key] == again[key]).all() for key in first)
    steps = [entry["step"] for entry in state(folder / "checkpoint-4")["log_history"] if "loss" in entry]
    assert steps == [1, 2, 3, 4]


def test_streaming(tiny_model, demonstrations, tmp_path, capsys):
    base = ["sft", "--model_name_or_path", tiny_model, "--dataset_name", demonstrations, "--streaming", "true"]
    base += ["--max_length", "64", "--output_dir", str(tmp_path), *SMALL.split()]
    assert main(list(map(str, [*base, "--max_steps", 3, "--dry-run"]))) == 0
    assert "3 optimiser steps (max_steps) of 6 rows" in capsys.readouterr().out
    assert main(list(map(str, [*base, "--max_steps", 3]))) == 0
    assert state(tmp_path / "checkpoint-3")["global_step"] == 3
    assert main(list(map(str, base))) == 2
    assert "the rows are a stream, whose end is not known: set max_steps" in capsys.readouterr().err


def test_reward_and_then_remax_on_it(tiny_model, pairs, prompts, rule, tmp_path):
    base = ["--model_name_or_path", tiny_model, "--max_steps", 2, "--save_strategy", "no"]
    lora = ["--use_peft", "--lora_target_modules", "all-linear", "--lora_r", 2]
    reward = train("reward", tmp_path / "reward", *base, "--dataset_name", pairs, "--max_length", 64)

    rewards = f"[{{type: classifier, path: {reward}, name: proxy}}]"
    base += ["--dataset_name", prompts, "--rewards", rewards, "--gold_reward", rule]
    base += ["--rollout.backend", "transformers"]
    base += ["--eval_strategy", "steps", "--eval_steps", 1, "--eval_dataset_name", prompts]
    base += ["--dataset_test_split", "train[:3]", "--max_completion_length", 6, "--max_prompt_length", 64]
    run = train("remax", tmp_path / "remax", *base, *lora)
    header, *records = [json.loads(line) for line in (run / "overoptimization.jsonl").read_text().splitlines()]
    assert (header["method"], header["proxy"], header["gold"]) == ("remax", "proxy", "short")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert (run / "adapter_config.json").exists()


def test_an_ensemble_of_reward_models(tiny_model, pairs, tmp_path, capsys):
    base = ["--model_name_or_path", tiny_model, "--dataset_name", pairs, "--max_length", 64, "--max_steps", 1]
    folder = train("reward", tmp_path / "rm", *base, "--ensemble", 2, "--save_strategy", "no")
    assert "the 2 members of the ensemble" in capsys.readouterr().out
    assert (folder / "member_0" / "model.safetensors").exists() and (folder / "member_1" / "model.safetensors").exists()
    assert (folder / "ensemble.json").exists()
    for member in (1, 0):
        alone = train("reward", tmp_path / "jobs", *base, "--ensemble", 2, "--ensemble_member", member)
        assert f"member {member} of 2" in capsys.readouterr().out
        assert (alone / "ensemble.json").exists() == (member == 0)
    for part in ("member_0/model.safetensors", "member_1/model.safetensors", "ensemble.json"):
        assert (alone / part).read_bytes() == (folder / part).read_bytes()
    half = train("reward", tmp_path / "half", *base, "--ensemble", 2, "--use_peft", "--dtype", "bfloat16")
    assert "beside bfloat16 weights" in (half / "member_1" / "README.md").read_text()


def test_an_error_in_a_reward_names_its_place(tiny_model, prompts, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("rewards:\n  - {type: rule, function: 'nowhere.py:fn'}\n")
    tokens = ["--model_name_or_path", str(tiny_model), "--dataset_name", prompts]
    assert main(["remax", "--config", str(config), *tokens]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"align: error: {config}, line 2: rewards.0: ") and "nowhere.py" in error


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ("true", True), ("True", True), ("false", None), ("a/b", "a/b"), ("AUTO", "auto")],
)
def test_resume_from(value, expected):
    assert resume_from(value) == expected


def test_ensembles_of_other_kinds_and_wrong_labels(tiny_model, pairs, tmp_path, capsys):
    base = ["--model_name_or_path", tiny_model, "--dataset_name", pairs, "--max_length", 64, "--max_steps", 1]
    base += ["--save_strategy", "no", "--ensemble", 2]
    trunk = ["--ensemble_kind", "shared_trunk", "--ensemble_upper_layers", 1, "--label_noise", 0.25]
    folder = train("reward", tmp_path / "trunk", *base, *trunk)
    flips = json.loads((folder / "flipped_labels.json").read_text())
    rows = len(Path(pairs).read_text().splitlines())
    assert (flips["share"], flips["seed"], len(flips["rows"])) == (0.25, 0, round(0.25 * rows))
    assert (folder / "shared_trunk.safetensors").exists() and (folder / "member_1/reward_normalizer.json").exists()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "flipped_labels.json").write_text("{}")  # of an earlier run
    lora = train("reward", tmp_path / "lora", *base, "--ensemble_kind", "lora", "--use_peft", "--lora_r", 2)
    assert (lora / "member_1/adapter_model.safetensors").exists() and not (lora / "flipped_labels.json").exists()
    other = ["--output_dir", str(tmp_path / "other"), "--use_cpu"]
    for wrong, message in (
        (["--ensemble_kind", "lora"], "needs a peft_config (use_peft: true"),
        (["--ensemble_kind", "shared_trunk"], "needs ensemble_upper_layers"),
        (["--ensemble_upper_layers", 1], "belong to ensemble_kind shared_trunk"),
        (["--ensemble_kind", "shared"], "ensemble_kind cannot be 'shared'; valid: separate, lora, shared_trunk"),
        (["--ensemble", 1, "--ensemble_kind", "lora"], "needs an ensemble of 2 or more"),
        (["--label_noise_seed", 3], "label_noise_seed needs label_noise"),
        (["--resume_from_checkpoint", "x/checkpoint-3"], "resumes with resume_from_checkpoint: auto"),
    ):
        assert main(["reward", *map(str, [*base, *wrong]), *other]) == 2
        assert message in capsys.readouterr().err


def test_a_sweep_does_not_begin_anew_where_a_folder_is_to_be_resumed(tiny_model, pairs, tmp_path, capsys):
    """Its finished points would be trained over."""
    argv = ["modpo", "--model_name_or_path", str(tiny_model), "--dataset_name", pairs, "--output_dir", str(tmp_path)]
    argv += ["--rewards", "{type: rule, function: align.data.toy:gold_helpfulness}", "--weights", "sweep", "--use_cpu"]
    assert main([*argv, "--resume_from_checkpoint", str(tmp_path / "w_1_0")]) == 2
    assert "a sweep resumes with resume_from_checkpoint: auto, not from the folder" in capsys.readouterr().err
