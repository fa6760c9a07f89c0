"""What `--dry-run` computes of runs whose rollouts last for several steps, and of budgets of tokens."""

import pytest
from datasets import Dataset

from align.cli.dry_run import micro_batch_tokens, step_text, steps_text
from align.config.resolve import resolve
from align.errors import ConfigError
from align.trainers.on_policy.buffer import block_sampler


@pytest.fixture
def resolved(tiny_model, prompts, pairs, rule):
    def make(method: str, options: str):
        offline = method in ("dpo", "reward")
        base = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(pairs if offline else prompts)]
        return resolve(method, None, [*base, *([] if offline else ["--rewards.0", rule]), *options.split()])

    return make


@pytest.mark.parametrize(
    ("method", "options", "epoch", "expected"),
    [
        ("ppo", "", 40, "20 prompts -> 40 steps per epoch -> 80 optimiser steps in 2 epochs"),
        ("ppo", "--num_mini_batches 3", 36, "36 steps per epoch -> 72 optimiser steps in 2 epochs; 2 prompts of every"),
        ("grpo", "--num_mini_batches 4", 8, "8 steps per epoch -> 16 optimiser steps in 2 epochs; 4 prompts of every"),
        ("grpo", "", 10, "10 steps per epoch -> 20 optimiser steps in 2 epochs"),
    ],
)
def test_steps_are_those_that_the_trainer_makes(method, options, epoch, expected, resolved):
    run = resolved(method, f"--per_device_train_batch_size 2 --num_train_epochs 2 {options}")
    assert expected in steps_text(run, 20, 1)
    if run.training.steps_per_rollout > 1:
        assert len(block_sampler(run.training, 20, lambda: 0)) == 2 * epoch  # prompts


def test_a_rollout_of_several_steps_is_told_and_must_be_filled(resolved):
    run = resolved("grpo", "--per_device_train_batch_size 4 --gradient_accumulation_steps 8 --num_mini_batches 4")
    assert step_text(run, 8).endswith("= 256 prompts x 8 samples -> 2048 sequences -> 1 optimiser step; a rollout of "
                                      "1024 prompts -> 4 steps")  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"1000 prompts do not fill one rollout of 1024: lower num_mini_batches \(4\)"
    ):
        steps_text(run, 1000, 8)


def test_pairs_of_drawn_completions_are_what_is_computed(resolved):
    """Online DPO draws 8 and trains the best and the worst."""
    drawn = "--per_device_train_batch_size 2 --num_generations 8 --max_completion_length 20 --max_prompt_length 10"
    rows = Dataset.from_dict({"prompt_ids": [[1] * 10, [1]]})
    assert micro_batch_tokens(resolved("online_dpo", drawn), rows) == 2 * (10 + 2 * 20)
    assert micro_batch_tokens(resolved("online_dpo", f"{drawn} --batching padded"), rows) == 2 * 2 * (10 + 20)


def test_a_budget_is_filled_from_all_rows_of_the_step(resolved):
    rows = Dataset.from_dict(
        {"prompt_ids": [[1] * 10, [1]], "chosen_ids": [[1] * 5] * 2, "rejected_ids": [[1] * 3] * 2}
    )
    batch = "--per_device_train_batch_size 2 --gradient_accumulation_steps 4"
    drawn = f"{batch} --num_generations 3 --max_completion_length 20 --max_prompt_length 10"
    for method, options, one, row in (
        ("grpo", drawn, 30, 10 + 3 * 20),
        ("dpo", batch, 18, 18),
        ("reward", batch, 18, 18),
    ):
        assert micro_batch_tokens(resolved(method, options), rows) == 2 * row
        for budget, tokens in ((one, one), (5 * row, 5 * row), (1000, 8 * row)):
            assert micro_batch_tokens(resolved(method, f"{options} --tokens_per_batch {budget}"), rows) == tokens
