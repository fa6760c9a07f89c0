"""Calls and trainers one after another: evaluations before training, `train` again, a model that the next one takes."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, TrainerCallback

from align import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from align.cli import build
from align.config.resolve import resolve
from align.data import toy
from align.errors import ConfigError
from align.modeling.load import freeze_copy
from align.reward_models.base import RewardBatch
from align.reward_models.classifier import ClassifierReward
from tests.trainers.core.evaluated_ranks import CASES, compared
from tests.trainers.core.matrix_ranks import METHODS, command, write_data
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import QUIET, demonstrations, logged, tiny_model
from tests.warm import run_ranks


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    folder, tokenizer = tmp_path_factory.mktemp("policy"), toy.tokenizer()
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def check(found: dict) -> None:
    assert set(found) == set(CASES)
    for case, (first, plain) in found.items():
        assert len(first["before"]) > 1 and set(first["during"]) == {0, 3}, case
        assert first["before"] == first["during"][0] == plain["during"][0], case
        assert first["after"] == first["during"][3] == plain["after"], case
        assert first["after"] != first["before"], case
        assert first["weights"] and all(w.equal(plain["weights"][name]) for name, w in first["weights"].items()), case
        if case[0] == "dpo":
            assert first["before"]["rewards/margins"] == 0, case  # the policy is the reference
        if case[0] == "remax":
            assert first["before"]["kl"] == 0


def test_in_one_process(policy, tmp_path):
    check(compared(policy, tmp_path, "one", 1))


def test_on_two_processes(policy, tmp_path):
    run_ranks("tests.trainers.core.evaluated_ranks", policy, str(tmp_path), "ddp", "fsdp2", logs=tmp_path / "logs")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for setup in ("ddp", "fsdp2"):
        for found in ranks:
            check(found[setup])
        for case in CASES:
            own, other = (found[setup][case][0]["weights"] for found in ranks)
            assert all(weight.equal(other[name]) for name, weight in own.items()), (setup, case)


def test_a_model_that_another_trainer_has_trained_has_the_precision_of_this_run(tmp_path):
    """As policy and as reference, whatever the earlier trainer computed in."""
    tokenizer, pairs = toy.tokenizer(), toy_pairs(8)
    model, reference = tiny_model(tokenizer), tiny_model(tokenizer, seed=1)
    rest = {**QUIET, "max_steps": 1, "learning_rate": 0.0, "max_length": 32, "beta": 1.0}

    def measured(policy, reference, **options) -> dict[str, float]:
        args = DPOConfig(str(tmp_path), **rest, **options)
        trainer = DPOTrainer(policy, args, pairs, pairs, processing_class=tokenizer, ref_model=reference)
        found = trainer.evaluate()
        trainer.train()
        return {key: found[f"eval_{key}"] for key in ("logps/chosen", "rewards/chosen")}

    fresh = [measured(tiny_model(tokenizer), tiny_model(tokenizer, seed=1), bf16=bf16) for bf16 in (False, True)]
    assert fresh[0] != fresh[1]
    assert [measured(model, reference, bf16=bf16) for bf16 in (True, False, True)] == [fresh[1], fresh[0], fresh[1]]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_copy_of_a_trained_model_is_a_model_of_its_own(bf16, tmp_path):
    """TRL's SFT puts a function that calls the model in the place of `forward`, and accelerate its autocast around."""
    model = tiny_model(toy.tokenizer())
    args = SFTConfig(str(tmp_path), **QUIET, max_steps=1, max_length=32, bf16=bf16)
    SFTTrainer(model, args, demonstrations(8), processing_class=toy.tokenizer()).train()
    twin, fresh, ids = freeze_copy(model), copied(model), torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = fresh(input_ids=ids).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert twin(input_ids=ids).logits.equal(expected)


def test_one_model_is_trained_by_one_trainer_after_another(tmp_path):
    """As each trains the saved model of the one before, evaluations between them included."""
    tokenizer, pairs, rows = toy.tokenizer(), toy_pairs(8), demonstrations(8)
    rest = {**QUIET, "max_steps": 2, "learning_rate": 1e-3, "max_length": 32}

    def sft(model, bf16: bool):
        args = SFTConfig(str(tmp_path / "sft"), bf16=bf16, **rest)
        return SFTTrainer(model, args, rows, rows, processing_class=tokenizer)

    def dpo(model, bf16: bool):
        args = DPOConfig(str(tmp_path / "dpo"), bf16=bf16, **rest)
        return DPOTrainer(model, args, pairs, pairs, processing_class=tokenizer)

    model, found = tiny_model(tokenizer), []
    for made, bf16 in ((sft, True), (dpo, False), (sft, False), (dpo, True)):
        apart = made(copied(model), bf16)
        apart.train()
        trainer = made(model, bf16)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after, expected = trainer.evaluate()["eval_loss"], apart.evaluate()["eval_loss"]
        assert before != after == expected
        assert all(p.equal(q) for p, q in zip(model.parameters(), apart.model.parameters(), strict=True))
        found.append(after)
    assert len(set(found)) == 4


def copied(model):
    """The weights in a model that nothing has been done to."""
    fresh = tiny_model(toy.tokenizer())
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize("method", ["sft", "dpo", "remax"])
def test_a_second_call_of_train_goes_on(method, policy, tmp_path):
    """From the weights of the first, which the check of the reference does not take for a wrong start."""
    argv = command(method, "bf16 autocast", "full", policy, write_data(tmp_path), 1)
    if method == "sft":
        argv += ["--implicit_reward_beta", "0.1"]
    trainer = build.trainer(resolve(method, None, [*argv, "--output_dir", str(tmp_path / "run")]))
    key = {"sft": "implicit/rewards", "dpo": "rewards/chosen", "remax": "kl"}[method]
    trainer.train()
    assert logged(trainer, key)[0] == pytest.approx(0, abs=1e-6)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert len(logged(trainer, key)) == 3 and logged(trainer, key)[0] != pytest.approx(0, abs=1e-3)
    assert not any(p.equal(q) for p, q in zip(trainer.model.parameters(), weights, strict=True))
    if hasattr(trainer, "close"):
        trainer.close()


def test_a_reward_model_that_was_trained_here_scores_in_its_own_precision(tmp_path):
    tokenizer, pairs = toy.tokenizer(), toy_pairs(8)
    config = tiny_model(tokenizer).config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    args = RewardConfig(str(tmp_path), **QUIET, max_steps=2, max_length=32, bf16=True)
    RewardTrainer(model, args, pairs, processing_class=tokenizer).train()
    fresh = AutoModelForSequenceClassification.from_config(config)
    fresh.load_state_dict(model.state_dict())
    batch = RewardBatch(list(pairs["prompt"]), list(pairs["chosen"]))
    trained, expected = (ClassifierReward(one, tokenizer=tokenizer).score(batch).scores for one in (model, fresh))
    assert trained.equal(expected) and expected.std() > 0


def test_a_model_that_is_frozen_is_refused(tmp_path, policy):
    """As PEFT leaves one that an adapter is merged into."""
    rows, folder = demonstrations(8), str(tmp_path)
    args = SFTConfig(folder, **QUIET, max_steps=1, max_length=32)
    trainer = SFTTrainer(policy, args, rows, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.train()
    merged = trainer.model.merge_and_unload()
    pairs = toy_pairs(8)
    again = DPOTrainer(merged, DPOConfig(folder, **QUIET, max_steps=1, max_length=32), pairs)
    with pytest.raises(ConfigError, match="no parameter of the model requires a gradient.*merge_and_unload"):
        again.train()
    merged.requires_grad_(True)
    assert again.train().global_step == 1


def test_processes_that_train_apart_end(policy, tmp_path):
    """At a rate of 1e-6, where a step moves a weight by some ten units in its last place."""
    run_ranks("tests.trainers.core.apart_ranks", policy, str(tmp_path), logs=tmp_path / "logs")
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found[0].startswith("after step 1 the processes have other weights (21 of 21 trainable tensors differ")
        assert found[3].startswith("after step 2 the processes have other weights")


def without_times(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if "time" not in key and "per_second" not in key}


class Raises(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
def test_the_same_trainer_resumes_what_was_interrupted(method, policy, tmp_path):
    """As in a notebook: with the weights and the log of a run that was not."""

    def made(name: str):
        argv = command(method, "float32", "lora", policy, write_data(tmp_path), 1)
        argv += ["--output_dir", str(tmp_path / name), "--save_strategy", "steps", "--save_steps", "2"]
        return build.trainer(resolve(method, None, [*argv, "--max_steps", "4"]))

    whole, interrupted = made("whole"), made("interrupted")
    whole.train()
    interrupted.add_callback(Raises())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    interrupted.pop_callback(Raises)
    interrupted.train(resume_from_checkpoint=True)
    for own, other in zip(interrupted.model.parameters(), whole.model.parameters(), strict=True):
        assert own.equal(other)
    shown = [[without_times(entry) for entry in t.state.log_history[:4]] for t in (whole, interrupted)]
    assert shown[0] == shown[1] and len(shown[0]) == 4
    for trainer in (whole, interrupted):
        if hasattr(trainer, "close"):
            trainer.close()


def test_deepspeed_is_said(tmp_path, monkeypatch):
    args, rows = SFTConfig(str(tmp_path), **QUIET, max_steps=1, max_length=32), demonstrations(4)
    trainer = SFTTrainer(tiny_model(toy.tokenizer()), args, rows, rows, processing_class=toy.tokenizer())
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ConfigError, match="DeepSpeed has the model only once it trains: set eval_on_start: true"):
        trainer.evaluate()
