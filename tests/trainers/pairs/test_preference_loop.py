"""The loop of the preference trainers: batches, guards, evaluation, resume, export."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from align.data.collate import PairCollator
from align.errors import ConfigError, DataError, TrainingError
from align.modeling.load import load_policy, load_tokenizer
from align.modeling.pairs import pair_tokens
from align.trainers.dpo import DPOTrainer
from align.trainers.pairs.micro_batches import PaddedPairs, SharedPrefixPairs
from tests.trainers.pairs.preference_runs import assert_close, assert_same_run, dpo_config, history, toy_pairs
from tests.trainers.tiny_runs import assert_same, logged, parameters

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def pairs():
    return toy_pairs(40)


def trained(policy, args, pairs, eval_pairs=None, **options) -> DPOTrainer:
    trainer = DPOTrainer(policy, args, pairs, eval_pairs, **options)
    trainer.train()
    return trainer


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    {"per_device_train_batch_size": 16, "tokens_per_batch": 90},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "tokens_per_batch": 100_000},
    {"per_device_train_batch_size": 16, "chunk_size": 7},
    {"per_device_train_batch_size": 16, "batching": "padded"},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "batching": "padded"},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "batching": "padded", "tokens_per_batch": 200},
])  # fmt: skip
def test_how_a_step_is_batched_does_not_matter(options, policy, pairs, tmp_path):
    """40 pairs in steps of 16: the third step has 8. `auto` is shared prefixes here."""
    settings = {"max_steps": 3}
    whole = trained(policy, dpo_config(tmp_path / "a", per_device_train_batch_size=16, **settings), pairs)
    cut = trained(policy, dpo_config(tmp_path / "b", **settings, **options), pairs)
    assert isinstance(whole.planner.layout, SharedPrefixPairs)
    assert isinstance(cut.planner.layout, PaddedPairs if "batching" in options else SharedPrefixPairs)
    assert_same_run(history(cut), history(whole))
    for name, weight in parameters(whole.model).items():
        torch.testing.assert_close(cut.model.get_parameter(name), weight, rtol=0, atol=3e-4, msg=name)


def test_an_evaluation_is_a_mean_over_pairs(policy, pairs, tmp_path):
    values = []
    for size in (1, 3, 13):
        args = dpo_config(tmp_path, per_device_eval_batch_size=size)
        trainer = DPOTrainer(policy, args, pairs, toy_pairs(13, seed=1))
        trainer.model.get_input_embeddings().weight.data.mul_(1.1)  # the policy has moved, the reference has not
        values.append(trainer.evaluate())
    for other in values[1:]:
        for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/rejected"):
            assert other[name] == pytest.approx(values[0][name], rel=1e-5, abs=2e-6)
    assert values[0]["eval_rewards/margins"] != 0
    other = trainer.evaluate(toy_pairs(5, seed=2))  # pairs that the trainer has not seen
    assert other["eval_loss"] != values[0]["eval_loss"]


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA])
def test_it_learns_and_its_export_has_the_same_log_probs(lora, policy, tokenizer, tmp_path):
    args = dpo_config(
        tmp_path, max_steps=25, learning_rate=1e-2 if lora else 1e-3, eval_strategy="steps", eval_steps=25
    )
    data = toy_pairs(80)
    trainer = trained(policy, args, data, data, peft_config=lora)
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931472, abs=1e-6)
    assert logged(trainer, "eval_loss")[-1] < 0.6 and logged(trainer, "eval_rewards/accuracies")[-1] > 0.8
    trainer.save_model()
    batch = PairCollator(tokenizer.pad_token_id)([dict(row) for row in trainer.train_dataset.select(range(6))])
    with torch.no_grad():
        ours, saved = pair_tokens(trainer.model.eval(), batch), pair_tokens(load_policy(str(tmp_path)).eval(), batch)
        start = pair_tokens(load_policy(policy).eval(), batch)
    torch.testing.assert_close(saved.logps, ours.logps, rtol=0, atol=2e-5)
    assert (start.logps - ours.logps).abs().max() > 0.1


# ---- guards ----------------------------------------------------------------------------------------------------------


def test_a_policy_that_is_not_its_reference_at_the_start_is_an_error(policy, pairs, tmp_path):
    trainer = DPOTrainer(policy, dpo_config(tmp_path), pairs)
    trainer.reference.model.get_input_embeddings().weight.data.mul_(1.5)
    with pytest.raises(TrainingError, match="before the first step the policy and its reference differ"):
        trainer.train()
    other = load_policy(policy)
    other.get_input_embeddings().weight.data.mul_(1.5)
    named = trained(policy, dpo_config(tmp_path / "b"), pairs, ref_model=other)  # said, so meant
    assert logged(named, "rewards/margins")[0] != 0
    other.save_pretrained(tmp_path / "other")
    again = trained(policy, dpo_config(tmp_path / "c", ref_model_name_or_path=str(tmp_path / "other")), pairs)
    assert_close(history(again), history(named), rtol=0, atol=0)


def test_a_loss_that_is_not_finite_names_its_rows(policy, pairs, tmp_path):
    class Broken(DPOTrainer):
        def losses(self, policy, reference, batch):
            found = super().losses(policy, reference, batch)
            found.losses = torch.where((batch["row"] == 11) | (batch["row"] == 3), torch.nan, found.losses)
            return found

    with pytest.raises(TrainingError, match=r"the loss is not finite on rows \[(3|11)"):
        Broken(policy, dpo_config(tmp_path, per_device_train_batch_size=40), pairs).train()


def test_pairs_that_train_no_token_are_refused(policy, pairs, tmp_path):
    with pytest.raises(DataError, match="chosen is empty: 1 \\(row 1\\)"):
        rows = [{"prompt": "tell me ", "chosen": chosen, "rejected": "well"} for chosen in ("rose", " ")]
        DPOTrainer(policy, dpo_config(tmp_path), Dataset.from_list(rows))
    tokenized = Dataset.from_list([{"prompt_ids": [3], "chosen_ids": ids, "rejected_ids": [4]} for ids in ([5], [])])
    with pytest.raises(DataError, match=r"1 tokenised pairs have an empty chosen_ids: rows \[1\]"):
        DPOTrainer(policy, dpo_config(tmp_path), tokenized)


def test_a_model_that_cannot_share_prefixes_gets_padded_batches(policy, pairs, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    eager = load_policy(policy, attn_implementation="eager")
    trainer = DPOTrainer(eager, dpo_config(tmp_path), pairs, processing_class=tokenizer)
    assert isinstance(trainer.planner.layout, PaddedPairs) and "batches are padded" in caplog.text
    with pytest.raises(ConfigError, match="shared_prefix cannot be used with this model: its attention is eager"):
        DPOTrainer(eager, dpo_config(tmp_path, batching="shared_prefix"), pairs, processing_class=tokenizer)
    # a reference that cannot decides for both
    both = DPOTrainer(policy, dpo_config(tmp_path), pairs, ref_model=eager)
    assert isinstance(both.planner.layout, PaddedPairs)
    both.train()


def test_options_that_would_be_ignored_are_errors(policy, pairs, tmp_path):
    with pytest.raises(ConfigError, match="only with precompute_ref_log_probs"):
        dpo_config(tmp_path, ref_log_probs_dir="x")
    with pytest.raises(ConfigError, match="named twice"):
        DPOTrainer(policy, dpo_config(tmp_path, ref_model_name_or_path=policy), pairs, ref_model=policy)
    with pytest.raises(ConfigError, match="batching cannot be 'packed'; valid: auto, shared_prefix, padded"):
        dpo_config(tmp_path, batching="packed")
    for name in ("tokens_per_batch", "chunk_size", "precompute_ref_batch_size"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1"):
            dpo_config(tmp_path, **{name: 0})


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {},
    {"precompute_ref_log_probs": True},
    {"tokens_per_batch": 100, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
])  # fmt: skip
@pytest.mark.parametrize("lora", [None, LORA])
def test_resume_is_exact(options, lora, policy, pairs, tmp_path):
    """Steps of 8 of 40 pairs: checkpoint 3 is within an epoch, checkpoint 5 at its end, checkpoint 8 the last."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, **options}
    whole = trained(policy, dpo_config(tmp_path, **settings), pairs, peft_config=lora)
    for step in (3, 5):
        resumed = DPOTrainer(policy, dpo_config(tmp_path, **settings), pairs, peft_config=lora)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(parameters(resumed.model), parameters(whole.model))
        assert_close(history(resumed), history(whole), rtol=0, atol=0)


def test_a_run_goes_on_with_the_reference_it_began_with(policy, pairs, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trained(policy, dpo_config(tmp_path, **settings), pairs)
    moved = load_policy(str(tmp_path / "checkpoint-2"))
    tokenizer = load_tokenizer(policy)
    for allowed, refusal in (([], "is of another run .model:"), (["model"], "not the one of the run that is resumed")):
        args = dpo_config(tmp_path, resume_changes=allowed, **settings)
        trainer = DPOTrainer(moved, args, pairs, processing_class=tokenizer)
        with pytest.raises(TrainingError, match=refusal):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---- trackers --------------------------------------------------------------------------------------------------------


def test_wandb_gets_a_table_and_a_histogram(policy, pairs, wandb_offline):
    args = dpo_config(wandb_offline / "run", report_to="wandb", eval_strategy="steps", eval_steps=2)
    trained(policy, args, pairs, toy_pairs(12, seed=1))
    import wandb

    wandb.finish()
    (media,) = wandb_offline.glob("wandb/offline-run-*/files/media")
    (table,) = media.glob("table/**/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "prompt", "chosen", "rejected", "reward chosen", "reward rejected"]
    assert len(content["data"]) == 8 and content["data"][0][-1] != 0
    assert list(media.glob("images/**/*.png"))


def test_the_tokens_of_a_step_are_counted(policy, pairs, tmp_path):
    args = dpo_config(tmp_path, include_num_input_tokens_seen="all", per_device_train_batch_size=20, max_steps=2)
    trainer = trained(policy, args, pairs)
    assert trainer.state.num_input_tokens_seen == sum(trainer.collator.tokens_of(row) for row in trainer.train_dataset)
