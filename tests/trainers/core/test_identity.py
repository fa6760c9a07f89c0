"""A checkpoint knows its run: another one is refused with what differs; what does not change the result may change."""

import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from align.config.early_checks import COMPARED
from align.config.options import options_of
from align.errors import ConfigError, TrainingError
from align.trainers.core import identity
from align.trainers.core.identity import check_same_run, rows_digest, settings_of
from align.trainers.core.resumed import own_settings
from align.trainers.dpo import DPOTrainer
from align.trainers.reward import RewardTrainer
from align.trainers.sft import SFTTrainer
from tests.trainers import reward_runs
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import demonstrations, on_policy, prompts, sft_config, wanted_words

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "seed": 5}


def word_count(completions, **columns) -> list[float]:
    return [float(len(text.split())) for text in completions]


def make(method, policy, folder, *, rows=16, lora=None, reward=wanted_words, gold=None, first=0, **options):
    options = SAVED | options
    peft = None if lora is None else LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | lora)
    if method == "sft":
        data = demonstrations(rows + first).select(range(first, rows + first))
        return SFTTrainer(policy, sft_config(folder, **options), data, peft_config=peft)
    if method == "dpo":
        return DPOTrainer(policy, dpo_config(folder, **options), toy_pairs(rows), peft_config=peft)
    if method == "reward":
        return RewardTrainer(policy, reward_runs.config(folder, **options), toy_pairs(rows), peft_config=peft)
    trainer, args = on_policy(method, folder, **options)
    return trainer(policy, reward, args, prompts(rows), gold_reward=gold, peft_config=peft)


@pytest.fixture(scope="module")
def folder_of(policy, tmp_path_factory):
    """The folder of a run of one step, made once per method (and LoRA)."""
    made = {}

    def folder(method, **options):
        key = (method, str(options))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(method)
            trainer = make(method, policy, made[key], **options)
            trainer.train()
        return made[key]

    return folder


CONSTRAINTS = [
    {"reward": "wanted_words", "direction": "at_least", "threshold": 0.1},
    {"reward": "word_count", "direction": "at_most", "threshold": 5.0},
]
BOTH = {"reward": [wanted_words, word_count], "constraints": CONSTRAINTS}


@pytest.mark.parametrize(
    ("method", "first", "change", "named"),
    [
        ("sft", {}, {"learning_rate": 1e-5}, "learning_rate: 0.001 before, 1e-05 now"),
        ("sft", {}, {"seed": 6}, "seed: 5 before, 6 now"),
        ("sft", {}, {"per_device_train_batch_size": 4}, "rows_per_step: 8 before, 4 now"),
        ("sft", {}, {"dataloader_drop_last": True}, "dataloader_drop_last: None before, 8 now"),
        (
            "dpo",
            {"loss_type": "aot"},
            {"loss_type": "aot", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            "per_device_train_batch_size: 8 before, 4 now",
        ),
        ("sft", {}, {"max_length": 31}, "max_length: 32 before, 31 now"),
        ("sft", {}, {"first": 8}, "data: "),
        ("sft", {}, {"rows": 8}, "data: "),
        ("sft", {"lora": {}}, {"lora": {"lora_alpha": 9}}, "adapter.lora_alpha: 8 before, 9 now"),
        ("sft", {"lora": {}}, {}, "adapter: {.* before, None now"),
        ("dpo", {}, {"beta": 5.0}, "beta: None before, 5.0 now"),
        ("dpo", {}, {"loss_type": "ipo"}, "loss_type: "),
        ("remax", {}, {"reward": word_count}, "rewards.wanted_words: .* before, None now"),
        ("remax", {}, {"gold": word_count}, "gold_reward: None before"),
        ("remax", {}, {"temperature": 0.5}, "temperature: 1.0 before, 0.5 now"),
        ("remax", BOTH, {**BOTH, "constraints": CONSTRAINTS[::-1]}, "constraints: "),
    ],
)
def test_another_run_is_refused(method, first, change, named, policy, folder_of):
    with pytest.raises(TrainingError, match=f"is of another run \\(.*{named}") as error:
        make(method, policy, folder_of(method, **first), **change).train(resume_from_checkpoint="auto")
    assert "resume_changes: [" in str(error.value)


def test_a_reward_whose_file_has_changed_is_refused_with_the_reason():
    identity = {"rewards": {"mine": "a" * 32}, "gold_reward": None}
    with pytest.raises(
        TrainingError, match=r"resume_changes: \[rewards.mine\]. A reward counts by .* text of the file"
    ):
        check_same_run(identity, {**identity, "rewards": {"mine": "b" * 32}}, [], "checkpoint-2")
    with pytest.raises(TrainingError) as error:
        check_same_run(identity, {**identity, "rewards": {"other": "b" * 32}}, [], "checkpoint-2")
    assert "counts by" not in str(error.value)


@pytest.mark.parametrize(("before", "now"), [("dpo", "remax"), ("remax", "grpo"), ("reward", "sft")])
def test_another_method_is_refused(before, now, policy, folder_of):
    with pytest.raises(TrainingError, match=r"method: '\w+' before, '\w+' now"):
        make(now, policy, folder_of(before)).train(resume_from_checkpoint=True)


def test_what_does_not_change_the_result_may_change(policy, folder_of):
    """Further steps, other logging, saving and evaluation, and the same batch in other portions."""
    changes = {"max_steps": 2, "logging_steps": 3, "save_steps": 5, "eval_accumulation_steps": 2, "run_name": "b"}
    portions = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make("sft", policy, folder_of("sft"), **changes, **portions)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_a_rollout_in_other_portions_is_the_same(policy, folder_of):
    """`forward_tokens_per_batch` follows `tokens_per_batch`; TRL's size of a rollout is that of num_mini_batches."""
    portions = {"tokens_per_batch": 44, "generation_batch_size": 8, "num_generations_eval": 3}
    trainer = make("remax", policy, folder_of("remax"), max_steps=2, **portions)
    trainer.train(resume_from_checkpoint=True)
    trainer.close()
    assert trainer.state.global_step == 2 and trainer.args.forward_tokens_per_batch == 176


@pytest.mark.parametrize(
    ("name", "hint"),
    [("learnig_rate", "nearest valid: learning_rate"), ("reward.mine", "nearest valid: rewards"), ("", "valid are ")],
)
def test_a_change_of_what_no_run_has_is_refused(name, hint, policy, folder_of):
    """At once, not when the run is resumed after days and the change is not allowed."""
    with pytest.raises(ConfigError, match=f"resume_changes: '{name}' is no option of this run; {hint}") as error:
        make("sft", policy, folder_of("sft"), resume_changes=["adapter.r", "data", name]).train()
    assert error.value.key == "resume_changes"


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "remax"])
def test_all_that_runs_are_compared_by_can_be_named(method, policy, folder_of):
    gold = {"gold": word_count} if method == "remax" else {}
    trainer = make(method, policy, folder_of(method), **gold)
    assert set(trainer.identity()) <= {*COMPARED, "settings", identity.TEMPLATE_DATE}
    assert {*settings_of(trainer.args)} <= {*COMPARED, *options_of(method)}


def test_an_option_that_is_gone_can_be_allowed(policy, tmp_path, monkeypatch):
    """transformers removes some; that of the checkpoint differs from none."""
    with monkeypatch.context() as older:
        older.setattr(identity, "settings_of", lambda args: settings_of(args) | {"fp16_backend": "auto"})
        make("sft", policy, tmp_path).train()
    with pytest.raises(TrainingError, match=r"or allow the change: resume_changes: \[fp16_backend\]"):
        make("sft", policy, tmp_path).train(resume_from_checkpoint=True)
    trainer = make("sft", policy, tmp_path, resume_changes=["fp16_backend"], max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_a_change_is_allowed_by_name(policy, folder_of, caplog):
    options = {"learning_rate": 1e-4, "max_steps": 2, "save_strategy": "no"}
    with pytest.raises(TrainingError, match="is of another run .learning_rate"):
        make("sft", policy, folder_of("sft"), **options, resume_changes=["seed"]).train(resume_from_checkpoint=True)
    make("sft", policy, folder_of("sft"), **options, resume_changes=["learning_rate"]).train(
        resume_from_checkpoint=True
    )
    assert "with learning_rate 0.0001 instead of 0.001" in caplog.text


@pytest.mark.parametrize("method", ["sft", "dpo", "remax"])
def test_an_allowed_change_of_the_optimiser_or_the_schedule_holds(method, policy, folder_of):
    """The loaded states have the settings of the run that wrote them, which took the place of the allowed ones."""
    changes = {"learning_rate": 1e-4, "weight_decay": 0.3, "adam_beta1": 0.5, "adam_epsilon": 1e-3}
    options = {**changes, "max_steps": 4, "logging_steps": 1, "save_strategy": "no"}
    trainer = make(method, policy, folder_of(method), **options, resume_changes=[*changes])
    trainer.train(resume_from_checkpoint=str(folder_of(method) / "checkpoint-1"))
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert len(rates) == 4 and 0 < max(rates[1:]) <= 1e-4
    group = trainer.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"][0], group["eps"]) == (0.3, 0.5, 1e-3)


def test_the_first_step_of_a_longer_run_has_the_rate_of_its_own_schedule(policy, folder_of):
    """That of the finished run was 0, and a step's rows were lost."""
    schedule = {"lr_scheduler_type": "linear"}
    folder, options = folder_of("sft", **schedule), {"max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    trainer = make("sft", policy, folder, **schedule, **options)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert trainer.state.log_history[-2]["learning_rate"] == pytest.approx(0.5e-3)


@pytest.mark.parametrize(
    "change", [{"optim": "sgd"}, {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"}]
)
def test_a_state_that_nothing_can_be_done_with_is_refused(change, policy, folder_of):
    """It ended in torch's KeyError: 'momentum'."""
    name = next(iter(change))
    run = make("sft", policy, folder_of("sft"), max_steps=2, resume_changes=[name])
    setattr(run.args, name, change[name])
    with pytest.raises(TrainingError, match=f"{name}: .* holds a state of .*, with which .* cannot go on"):
        run.train(resume_from_checkpoint=True)


def test_a_loaded_state_leaves_the_settings_of_an_optimiser():
    """Of the critic, the discriminator and MetaAPO's h, which have optimisers of their own."""
    weights = [torch.nn.Parameter(torch.ones(2))]
    before = torch.optim.AdamW(weights, lr=0.5, weight_decay=0.1)
    weights[0].grad = torch.ones(2)
    before.step()
    now = torch.optim.AdamW(weights, lr=0.25, weight_decay=0.0)
    with own_settings(now):
        now.load_state_dict(before.state_dict())
    assert (now.param_groups[0]["lr"], now.param_groups[0]["weight_decay"]) == (0.25, 0.0)
    assert now.state[weights[0]]["step"] == 1


def test_a_checkpoint_named_in_the_configuration_is_resumed(policy, folder_of, tmp_path):
    """transformers leaves that option to the script, and `train()` began anew."""
    shutil.copytree(folder_of("sft") / "checkpoint-1", tmp_path / "checkpoint-1")  # other tests save into folder_of
    trainer = make("sft", policy, tmp_path, max_steps=3, save_strategy="no")
    for given in (str(tmp_path / "checkpoint-1"), True, "auto"):
        trainer.args.resume_from_checkpoint = given
        trainer.train()
        assert (trainer.resume_step, trainer.state.global_step) == (1, 3)
    trainer.train(resume_from_checkpoint=False)
    assert trainer.resume_step is None


def test_the_digest_of_rows_is_of_their_content():
    """Not of how they lie in memory; of their order and every value."""
    rows = [{"ids": [i, i + 1], "text": f"row {i}", "weight": i / 7} for i in range(2500)]
    whole, parts = Dataset.from_list(rows), Dataset.from_list(rows + rows).select(range(2500))
    assert rows_digest(whole) == rows_digest(parts)
    assert rows_digest(whole) != rows_digest(whole.select(range(2499)))
    assert rows_digest(whole) != rows_digest(whole.select([1, 0, *range(2, 2500)]))
    rows[2400]["weight"] += 1e-12
    assert rows_digest(whole) != rows_digest(Dataset.from_list(rows))
    assert rows_digest(whole, ("weight",)) == rows_digest(Dataset.from_list(rows), ("weight",))
