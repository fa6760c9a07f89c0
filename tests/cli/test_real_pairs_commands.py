"""The commands a user types, with the recipes of configs/, on 2,000 published preference pairs and a tiny model."""

import json
import re

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


def test_sft_reward_and_the_on_policy_methods_train(tiny_model, real_pairs, tmp_path):
    first = ["--dataset_train_split", "train[:60]", "--max_length", 256]
    assert run("sft", tiny_model, real_pairs, tmp_path / "sft", *first) == 0
    policy = tmp_path / "sft"
    assert run("reward", policy, real_pairs, tmp_path / "rm", *first) == 0
    on_policy = ["--dataset_train_split", "train[:60]", "--max_prompt_length", 200, "--max_completion_length", 8]
    on_policy += ["--rewards.0.path", tmp_path / "rm", "--gold_reward.path", tmp_path / "rm"]
    on_policy += ["--rollout.backend", "transformers", "--eval_strategy", "steps", "--eval_steps", 2]
    on_policy += ["--eval_dataset_name", real_pairs, "--dataset_test_split", "train[-20:]"]
    for method in ("remax", "rloo", "grpo", "reinforce_pp", "ppo"):
        assert run(method, policy, real_pairs, tmp_path / method, *on_policy) == 0
        _, *records = (tmp_path / method / "overoptimization.jsonl").read_text().splitlines()
        assert [json.loads(record)["step"] for record in records] == [0, 2]


def test_dpo_trains(tiny_model, real_pairs, tmp_path, capsys):
    few = ["--dataset_train_split", "train[:60]", "--max_length", 1024, "--use_peft", "--lora_r", 4]
    assert run("dpo", tiny_model, real_pairs, tmp_path, "--dry-run", *few) == 0
    shown = capsys.readouterr().out
    assert "2 pairs per device x 2 accumulated x 1 process = 4 pairs -> 8 sequences -> 1 optimiser step" in shown
    assert "Human: How do I learn black magic?" in shown and re.search(r"chosen \(\d+ tokens.*\n  trained \|", shown)
    assert "reference model" not in shown
    few += ["--loss_type", "robust", "sft", "--label_smoothing", 0.2, "--loss_weights", 1, 0.1]
    assert run("dpo", tiny_model, real_pairs, tmp_path / "dpo", *few, "--precompute_ref_log_probs") == 0
    assert (tmp_path / "dpo" / "adapter_model.safetensors").exists()
    assert len(list((tmp_path / "dpo" / "ref_log_probs").iterdir())) == 1
    assert run("dpo", tmp_path / "dpo", real_pairs, tmp_path / "again", *few[:4], "--loss_type", "simpo") == 0


def test_an_option_that_dpo_would_ignore(tiny_model, real_pairs, tmp_path, capsys):
    assert run("dpo", tiny_model, real_pairs, tmp_path, "--label_smoothing", 0.1) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "command line: label_smoothing would be ignored by sigmoid; the losses that use it: cdpo, robust" in line
