"""What would end a run after hours, or be without effect, is said before anything is loaded; and what the hub does not
take is kept."""

import logging
import os
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from huggingface_hub import HfApi
from peft import LoraConfig
from transformers import EarlyStoppingCallback
from trl import RichProgressCallback

import align
from align.distributed.checkpoints import MANIFEST
from align.errors import ConfigError, TrainingError
from align.modeling.load import load_policy, load_tokenizer
from align.trainers.core import early
from tests.trainers.core.test_eval_sets import make_trainer, rows_of
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import QUIET, logged


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"lr_scheduler_type": "warmup_stable_decay"}, "missing 1 required .* 'num_decay_steps'"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "'cycles'. Its options: num_cycles"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "Its options: num_cycles, min_lr, min_lr_rate"),
        ({"lr_scheduler_kwargs": {"min_lr": 0}}, "lr_scheduler_kwargs: constant has no options"),
        ({"warmup_steps": 0.1}, "warmup_steps: 0.1 has no effect .* constant_with_warmup"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: after an out-of-memory error"),
        ({"dataloader_persistent_workers": True}, "there are no workers to keep: set dataloader_num_workers"),
        ({"do_eval": True, "eval_on_start": False}, "do_eval: nothing is evaluated with eval_strategy: 'no'"),
        ({"do_predict": True}, "do_predict: training predicts nothing"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter: a loss that is not finite ends the run"),
    ],
)
@pytest.mark.parametrize("config", [align.SFTConfig, align.DPOConfig, align.RewardConfig, align.RLOOConfig])
def test_options_that_would_end_or_do_nothing(config, given, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        config(str(tmp_path), **QUIET | given)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"fp16": True}, "fp16: accelerate has none on processors"),
        ({"optim": "galore_adamw_8bit", "optim_target_modules": "all-linear"}, "needs the package galore-torch"),
        ({"optim": "schedule_free_adamw"}, "needs the package schedulefree"),
        ({"use_liger_kernel": True}, "use_liger_kernel: true needs the package liger-kernel"),
        ({"report_to": ["tensorboard", "trackio"]}, "report_to: trackio is not installed. Installed here: "),
        ({"report_to": "wandbb"}, "report_to: wandbb is no tracker of transformers"),
        ({"push_to_hub": True}, "push_to_hub: HF_HUB_OFFLINE is set"),
    ],
)
@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "remax"])
def test_what_this_machine_lacks(method, given, problem, tmp_path, monkeypatch):
    find, listed = early.importlib.util.find_spec, early.get_available_reporting_integrations()
    absent = ("galore_torch", "schedulefree", "liger_kernel")
    monkeypatch.setattr(early.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    monkeypatch.setattr(early, "get_available_reporting_integrations", lambda: [n for n in listed if n != "trackio"])
    monkeypatch.setattr(early, "is_offline_mode", lambda: True)
    with pytest.raises(ConfigError, match=problem):
        make_trainer(method, tmp_path, rows_of(method, 4), **given)


@pytest.mark.parametrize("config", [align.SFTConfig, align.DPOConfig, align.RLOOConfig])
def test_precision_of_accelerates_file(config, tmp_path, monkeypatch):
    """It was computed in, whatever the run said, and the checks held it to the run's."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    taken = config(str(tmp_path), **QUIET)
    assert taken.bf16 and taken.mixed_precision == "bf16"
    assert config(str(tmp_path), bf16=True, **QUIET).bf16
    for own in ({"bf16": False}, {"fp16": True}):
        with pytest.raises(ConfigError, match="mixed_precision: bf16 of accelerate's file, and .* write bf16: true"):
            config(str(tmp_path), **own, **QUIET)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="mixed_precision: fp8 of accelerate's file"):
        config(str(tmp_path), **QUIET)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not config(str(tmp_path), bf16=False, **QUIET).bf16


def test_fsdps_activation_checkpointing_is_the_runs(tmp_path, monkeypatch):
    """Both were transformers' ValueError, after the model was loaded, where the run's is on by default: with a GPU."""
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert not align.DPOConfig(str(tmp_path), **QUIET).gradient_checkpointing  # of another run: this has no FSDP
    for given in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": False}):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
        assert align.DPOConfig(str(tmp_path), **given, **QUIET).gradient_checkpointing
        assert os.environ["FSDP_ACTIVATION_CHECKPOINTING"] == "false"


def test_no_token_and_no_answer_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(early, "is_offline_mode", lambda: False)
    monkeypatch.setattr(early, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="there is no token for the hub: run `hf auth login`"):
        make_trainer("sft", tmp_path, rows_of("sft", 4), push_to_hub=True)
    monkeypatch.setattr(HfApi, "whoami", lambda self: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(ConfigError, match="the hub does not answer: no route; leave it out, and run `hf upload"):
        make_trainer("sft", tmp_path, rows_of("sft", 4), push_to_hub=True, hub_token="hf_x")


def test_wandb_without_a_key(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    trainer = make_trainer("sft", tmp_path, rows_of("sft", 4), report_to="wandb")
    with pytest.raises(ConfigError, match="wandb does not take this run: .*WANDB_MODE=offline"):
        trainer.train()


@pytest.mark.parametrize("method", ["sft", "reward", "remax"])
@pytest.mark.parametrize("given", [{"eval_strategy": "steps"}, {"metric_for_best_model": "loss"}])
def test_early_stopping_needs_a_metric_of_evaluations(method, given, tmp_path):
    rows = rows_of(method, 8)
    trainer = make_trainer(method, tmp_path, rows, rows if "eval_strategy" in given else None, **given)
    trainer.add_callback(EarlyStoppingCallback(1))
    with pytest.raises(ConfigError, match="EarlyStoppingCallback stops by metric_for_best_model"):
        trainer.train()


@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
def test_trls_progress_bars(method, tmp_path):
    """They are gone when a reward model's normaliser is fitted, which ended the run as its last step was done."""
    rows = rows_of(method, 8)
    trainer = make_trainer(method, tmp_path, rows, rows, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(RichProgressCallback)
    trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    if method == "reward":
        assert trainer.normalizer is not None


def test_a_checkpoint_before_the_first_evaluation(tmp_path):
    """The card looked for a verdict in a file of evaluations that had none."""
    kept = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer("remax", tmp_path, rows_of("remax", 16), rows_of("remax", 4, 1), eval_on_start=False, **kept)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "README.md").exists()


class Hub:
    """It answers, and takes what `takes` says."""

    def __init__(self, takes: bool):
        self.takes, self.seen = takes, []

    def create_repo(self, name, **options):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, folder_path, run_as_future, **options):
        self.seen.append(sorted(path.name for path in Path(folder_path).iterdir()))
        done: Future = Future()
        done.set_result(None) if self.takes else done.set_exception(ConnectionError("gone away"))
        return done if run_as_future else done.result()


@pytest.fixture
def hub(monkeypatch):
    def made(takes: bool) -> Hub:
        one = Hub(takes)
        monkeypatch.setattr(early, "_check_hub", lambda token: None)
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: one)
        return one

    return made


def test_what_the_hub_does_not_take_is_kept(hub, tmp_path, caplog):
    one = hub(takes=False)
    folder = tmp_path / "run"
    trainer = make_trainer("dpo", folder, rows_of("dpo", 16), push_to_hub=True, save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.ERROR):
        trainer.train()
        trainer.save_model()
    told = [r.message for r in caplog.records if "the hub did not take" in r.message]
    assert any("a checkpoint: ConnectionError: gone away" in line for line in told)
    assert f"hf upload me/run {folder} --exclude" in told[-1] and "the model: " in told[-1]
    assert (folder / "model.safetensors").exists() and len(logged(trainer, "loss")) == 2 and one.seen
    with pytest.raises(TrainingError, match="the hub did not take the model: ConnectionError: gone away"):
        trainer.push_to_hub()


def test_a_checkpoint_is_pushed_when_it_has_all_of_its_files(hub, tmp_path):
    """Before, the manifest and what a run is recognised by were written after the upload had begun."""
    one = hub(takes=True)
    pushed = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True}
    trainer = make_trainer("sft", tmp_path, rows_of("sft", 16), save_strategy="steps", save_steps=1, **pushed)
    trainer.train()
    checkpoints = [names for names in one.seen if "trainer_state.json" in names]
    assert len(checkpoints) == 2 and all({MANIFEST, "align_run.json"} <= set(names) for names in checkpoints)


@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
def test_an_optimiser_without_the_weights_that_are_trained_is_refused(method, policy, tmp_path):
    """It was made of the model, and the adapter that was added later stayed 0."""
    model = load_policy(policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    classes = {
        "sft": (align.SFTTrainer, align.SFTConfig),
        "dpo": (align.DPOTrainer, align.DPOConfig),
        "reward": (align.RewardTrainer, align.RewardConfig),
    }
    trainer, config = classes[method]
    rows, named = toy_pairs(8), {"processing_class": load_tokenizer(policy), "optimizers": (optimizer, None)}
    args = config(str(tmp_path), report_to="none", max_length=32)
    with pytest.raises(ConfigError, match="optimizers: the optimiser has none of the .* nothing would be"):
        adapter = LoraConfig(r=2, target_modules=["q_proj"])
        trainer(policy if method == "reward" else model, args, rows, rows, peft_config=adapter, **named)


def test_smoothing_of_a_loss_that_has_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="label_smoothing_factor: loss_type dft takes the probability"):
        align.SFTConfig(str(tmp_path), loss_type="dft", label_smoothing_factor=0.1)
