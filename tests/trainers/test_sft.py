import copy
import errno
import os

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from align.data.collate import labelled
from align.data.labels import IGNORED
from align.data.tokenize import tokenize_completions
from align.errors import ConfigError, DataError, TrainingError
from align.modeling.load import load_policy
from align.modeling.logprobs import token_logps
from align.trainers.sft import SFTTrainer
from tests.trainers.tiny_runs import demonstrations, logged, sft_config, tiny_model

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def logps(model, rows) -> torch.Tensor:
    ids = torch.tensor([rows[0]["input_ids"]])
    return token_logps(model.eval(), ids, torch.ones_like(ids)).detach()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_it_learns_saves_and_loads(lora, policy, tmp_path):
    args = sft_config(
        tmp_path,
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=2e-2 if lora else 5e-3,
        eval_strategy="steps",
        eval_steps=15,
        gradient_checkpointing=lora,  # with frozen embeddings the gradient must find its way all the same
    )
    trainer = SFTTrainer(
        policy, args, demonstrations(96), demonstrations(32, seed=1), peft_config=LoraConfig(**LORA) if lora else None
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - (0.3 if lora else 1.0), losses
    assert min(logged(trainer, "grad_norm")) > 0
    assert logged(trainer, "eval_loss")[-1] < losses[0]
    assert {"mean_token_accuracy", "time/train"} <= set(trainer.state.log_history[0])
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists() == lora
    saved = load_policy(str(tmp_path))
    difference = (logps(saved, trainer.train_dataset) - logps(trainer.model, trainer.train_dataset)).abs().max()
    assert difference < (1e-5 if lora else 1e-7)  # merging rounds
    assert (logps(load_policy(policy), trainer.train_dataset) - logps(saved, trainer.train_dataset)).abs().max() > 0.1


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_batch_times_accumulation_does_not_matter(lora, policy, tmp_path):
    """13 rows: the second step has 5, which the cuts divide unevenly."""
    data = demonstrations(13)

    def steps(batch, accumulation):
        args = sft_config(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        trainer = SFTTrainer(policy, args, data, peft_config=LoraConfig(**LORA) if lora else None)
        trainer.train()
        return torch.tensor([logged(trainer, "loss"), logged(trainer, "grad_norm")])

    expected = steps(8, 1)
    for cut in ((4, 2), (1, 8)):
        torch.testing.assert_close(steps(*cut), expected, rtol=1e-5, atol=0)


def test_only_completions_are_trained(tokenizer, policy, tmp_path):
    """The loss is the mean negative log-prob of completion tokens and EOS, computed here token by token."""
    data = demonstrations(8)
    trainer = SFTTrainer(policy, sft_config(tmp_path, max_steps=1), data)
    trainer.train()
    model, nll, count = load_policy(policy).eval(), 0.0, 0
    for row in data:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        each = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[len(prompt) - 1 :]
        nll, count = nll - each.sum().item(), count + len(each)
    assert logged(trainer, "loss")[0] == pytest.approx(nll / count, rel=1e-4)


def test_logits_with_a_soft_cap(tokenizer, tmp_path):
    """Of an architecture that calls it otherwise than TRL's head does."""
    config = RecurrentGemmaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, lru_width=32, block_types=["recurrent", "attention"], logits_soft_cap=0.5,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = RecurrentGemmaForCausalLM(config)
    args = sft_config(tmp_path, max_steps=1, learning_rate=0)
    trainer = SFTTrainer(model, args, demonstrations(8), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = model(**batch).loss.item()
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)
    assert "final_logit_softcapping" not in model.config.to_dict()


@pytest.mark.parametrize("rows", ["text", "tokenised", "stream"])
def test_without_padding_the_same_is_trained(rows, tokenizer, policy, tmp_path):
    """TRL refuses padding_free with a max_length, which it does not hold there, and the default is one."""
    data = demonstrations(16)
    if rows != "text":
        data = tokenize_completions(data, tokenizer, max_length=None)
    losses = []
    for options in ({}, {"padding_free": True}):
        given = data.to_iterable_dataset() if rows == "stream" else data
        trainer = SFTTrainer(policy, sft_config(tmp_path, max_length=14, **options), given, demonstrations(8, seed=1))
        trainer.train()
        assert trainer.args.max_length == 14
        losses.append([*logged(trainer, "loss"), trainer.evaluate()["eval_loss"], trainer.evaluate(data)["eval_loss"]])
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["input_ids"].shape[1] <= 14 * 8 and (batch["input_ids"].shape[0] == 1) == bool(options)
        if options:
            assert batch["position_ids"].max() == 13  # cut at max_length
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="eval_packing: .*set packing: true"):
        sft_config(tmp_path, padding_free=True, eval_packing=True)


def test_an_evaluation_set_given_later_is_tokenised_alike(policy, tmp_path):
    data = demonstrations(16, seed=1)
    trainer = SFTTrainer(policy, sft_config(tmp_path), demonstrations(16), data)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate(data)["eval_loss"]


def test_evaluations_are_per_token(policy, tmp_path):
    """However the rows are cut into batches, and equal to the loss of a step on the same rows."""
    data, losses = demonstrations(7, seed=1), []
    others = []
    for size in (7, 3, 1):
        trainer = SFTTrainer(policy, sft_config(tmp_path, per_device_eval_batch_size=size, max_steps=1), data, data)
        losses.append(trainer.evaluate()["eval_loss"])
        log = trainer.state.log_history[-1]
        others.append([log["eval_entropy"], log["eval_mean_token_accuracy"]])
    assert others[1] == pytest.approx(others[0], rel=1e-5) and others[2] == pytest.approx(others[0], rel=1e-5)
    trainer.train()
    assert losses == pytest.approx(logged(trainer, "loss") * 3, rel=1e-5)


def test_a_batch_of_repeated_rows_alone_is_no_loss_to_evaluate(policy, tmp_path, monkeypatch):
    """As the last processes have where the rows end before them: with smoothing the mean of no token is nan."""
    rows = demonstrations(3, seed=1)
    args = sft_config(tmp_path, per_device_eval_batch_size=2, label_smoothing_factor=0.1)
    trainer = SFTTrainer(policy, args, rows, rows)
    expected = trainer.evaluate(rows.select(range(2)))["eval_loss"]

    def leave_out(inputs):
        if len(inputs["labels"]) == 1:
            inputs["labels"][:] = IGNORED

    monkeypatch.setattr(trainer, "_leave_out_repeated", leave_out)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)


def test_what_a_step_logs_is_per_token(policy, tmp_path):
    data, logs = demonstrations(6, seed=1), []
    for size in (6, 3, 1):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size, "max_steps": 1}
        trainer = SFTTrainer(policy, sft_config(tmp_path, **options), data)
        trainer.train()
        logs.append([logged(trainer, name)[0] for name in ("loss", "entropy", "mean_token_accuracy")])
    assert logs[1] == pytest.approx(logs[0], rel=1e-5) and logs[2] == pytest.approx(logs[0], rel=1e-5)


def test_tokens_of_a_step_are_those_of_all_processes(policy, tmp_path, monkeypatch):
    """In the last step of an epoch accelerate's gathering for metrics leaves out processes with repeated rows."""
    data = demonstrations(8)
    expected = SFTTrainer(policy, sft_config(tmp_path, max_steps=1), data)
    expected.train()
    monkeypatch.setattr(Accelerator, "gather_for_metrics", lambda self, values: torch.zeros_like(values))
    trainer = SFTTrainer(policy, sft_config(tmp_path, max_steps=1), data)
    trainer.train()
    for name in ("num_tokens", "entropy"):
        assert logged(trainer, name) == logged(expected, name) and logged(trainer, name)[0] > 0
    assert trainer.evaluate(data)["eval_entropy"] == 0  # evaluations leave repeated rows out by it


def test_several_evaluation_sets_by_name(policy, tmp_path):
    data = demonstrations(8, seed=1)
    sets = {"some": data.select(range(3)), "rest": data.select(range(3, 8))}
    trainer = SFTTrainer(policy, sft_config(tmp_path), data, sets)
    own = trainer.evaluate()
    assert own["eval_some_loss"] != own["eval_rest_loss"]
    assert trainer.evaluate(sets)["eval_rest_loss"] == own["eval_rest_loss"]


def test_options_without_effect_are_refused_by_name(tmp_path):
    for name, value in {"dataset_text_field": "content", "pad_to_multiple_of": 8}.items():
        with pytest.raises(ConfigError, match=f"{name} has no effect here"):
            sft_config(tmp_path, **{name: value})


def test_a_tokenizer_without_padding_token(tokenizer, tmp_path):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    trainer = SFTTrainer(tiny_model(tokenizer), sft_config(tmp_path), demonstrations(16), processing_class=bare)
    trainer.train()
    padded = SFTTrainer(tiny_model(tokenizer), sft_config(tmp_path), demonstrations(16), processing_class=tokenizer)
    padded.train()
    assert logged(trainer, "loss") == pytest.approx(logged(padded, "loss"), rel=1e-6)


def test_a_step_that_trains_no_token_is_an_error(policy, tmp_path):
    trainer = SFTTrainer(policy, sft_config(tmp_path), demonstrations(8))
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {**collate(rows), "labels": torch.full_like(collate(rows)["labels"], -100)}
    with pytest.raises(TrainingError, match="step 1 would train no token"):
        trainer.train()


def test_a_row_that_trains_no_token_is_an_error(policy, tmp_path):
    with pytest.raises(DataError, match="completion is empty"):
        SFTTrainer(policy, sft_config(tmp_path), Dataset.from_dict({"prompt": ["tell me : "], "completion": [""]}))
    tokenised = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 3, "completion_mask": [[0, 0, 1], [1, 0, 0], [0, 0, 0]]})
    with pytest.raises(DataError, match=r"rows \[1, 2\]"):
        SFTTrainer(policy, sft_config(tmp_path), tokenised)


def test_a_loss_that_is_not_finite_is_an_error(tokenizer, tmp_path):
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.inf
    trainer = SFTTrainer(model, sft_config(tmp_path), demonstrations(8), processing_class=tokenizer)
    with pytest.raises(TrainingError, match="the loss of step 1 is"):
        trainer.train()


def test_options_that_follow_from_the_data_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="completion_only_loss: the loss mask follows from"):
        sft_config(tmp_path, completion_only_loss=False)
    with pytest.raises(ConfigError, match="max_bad_share must be at least 0 and below 1"):
        sft_config(tmp_path, max_bad_share=1.5)


@pytest.mark.parametrize("given", ["text", "tokens"])
def test_no_pass_over_the_rows_goes_row_by_row(given, tokenizer, tmp_path, monkeypatch):
    """TRL's labels, its cut and its filter were three, of minutes each for a million rows."""
    rows, kept = demonstrations(12), Dataset.map
    if given == "tokens":
        rows = tokenize_completions(rows, tokenizer, max_length=32)

    def batched(self, *args, **options):
        assert options.get("batched"), options.get("desc")
        return kept(self, *args, **options)

    monkeypatch.setattr(Dataset, "map", batched)
    trainer = SFTTrainer(tiny_model(tokenizer), sft_config(tmp_path), rows, rows.select(range(4)), tokenizer)
    monkeypatch.undo()
    expected = tokenize_completions(demonstrations(12), tokenizer, max_length=32).map(labelled)
    assert trainer.train_dataset["labels"] == expected["labels"] and len(trainer.eval_dataset) == 4
    assert trainer.train_dataset["input_ids"] == expected["input_ids"] and any(expected["labels"][0])


@pytest.mark.parametrize(
    ("place", "what"), [("trl.SFTTrainer.__init__", "packs"), ("align.trainers.sft.with_labels", "labels of tokenised")]
)
def test_a_disk_that_is_full_of_the_packs_is_named(place, what, policy, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(place, full)
    with pytest.raises(DataError, match=f"{what}.* cannot be written in .*: No space left .*HF_DATASETS_CACHE"):
        SFTTrainer(policy, sft_config(tmp_path, packing=True), demonstrations(22))
