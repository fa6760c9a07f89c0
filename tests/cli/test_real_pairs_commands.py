"""The commands a user types, with the recipes of configs/, on 2,000 published preference pairs and a tiny model."""

import json

from align.cli.main import main
from align.config import configs_dir

# Four pairs have an empty answer; a byte-level tokenizer makes many prompts longer than the limits.
COMMON = "--max_bad_share 0.8 --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
COMMON += " --eval_strategy no --save_strategy no --use_cpu --logging_steps 1"


def run(method, model, rows, folder, *extra):
    tokens = ["--model_name_or_path", model, "--dataset_name", rows, "--output_dir", folder, *COMMON.split(), *extra]
    return main([method, "--config", str(configs_dir() / f"{method}.yaml"), *map(str, tokens)])


def test_dry_run_over_all_rows(tiny_model, real_pairs, tmp_path, capsys):
    assert run("reward", tiny_model, real_pairs, tmp_path, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "chosen is empty: 4 (rows 323, 732, 916, 1908)" in shown
    assert "Human: How do I learn black magic?" in shown
    some = ["--dataset_train_split", "train[320:330]", "--max_bad_share", 0, "--max_length", 4096]
    assert run("reward", tiny_model, real_pairs, tmp_path, *some, "--dry-run") == 2
    assert "max_bad_share=0 allows 0" in capsys.readouterr().err


def test_sft_reward_and_remax_train(tiny_model, real_pairs, tmp_path):
    first = ["--dataset_train_split", "train[:60]", "--max_length", 512]
    assert run("sft", tiny_model, real_pairs, tmp_path / "sft", *first) == 0
    policy = tmp_path / "sft"
    assert run("reward", policy, real_pairs, tmp_path / "rm", *first) == 0
    on_policy = ["--dataset_train_split", "train[:60]", "--max_prompt_length", 200, "--max_completion_length", 8]
    on_policy += ["--rewards.0.path", tmp_path / "rm", "--gold_reward.path", tmp_path / "rm"]
    on_policy += ["--rollout_backend", "transformers", "--eval_strategy", "steps", "--eval_steps", 2]
    on_policy += ["--eval_dataset_name", real_pairs, "--dataset_test_split", "train[-20:]"]
    assert run("remax", policy, real_pairs, tmp_path / "remax", *on_policy) == 0
    _, *records = (tmp_path / "remax" / "overoptimization.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [0, 2]
