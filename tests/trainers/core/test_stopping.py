"""Signals end a run with a checkpoint; a folder has one run at a time."""

import os
import signal

import pytest
from transformers import TrainerCallback

from align.errors import TrainingError
from align.trainers.core import signals
from align.trainers.core.lock import holding
from align.trainers.core.signals import REQUEUE, StopOnSignal
from align.trainers.sft import SFTTrainer
from tests.trainers.tiny_runs import assert_same, demonstrations, parameters, sft_config


def sft(policy, folder, **options):
    return SFTTrainer(policy, sft_config(folder, max_steps=4, **options), demonstrations(16))


class Send(TrainerCallback):
    def __init__(self, number):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_asks_to_be_queued_again(number, policy, tmp_path):
    before = signal.getsignal(number)
    trainer = sft(policy, tmp_path / "run")  # save_strategy: no
    trainer.add_callback(Send(number))
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == REQUEUE == 75
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(number) is before
    resumed = sft(policy, tmp_path / "run")
    resumed.train(resume_from_checkpoint="auto")
    straight = sft(policy, tmp_path / "straight")
    straight.train()
    assert_same(parameters(resumed.model), parameters(straight.model))


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss", "learning_rate": 1e-12}


@pytest.mark.parametrize(
    "options",
    [
        {"save_strategy": "steps", "save_steps": 1, "save_only_model": True},
        {**EVALUATED, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True},
        {**EVALUATED, "save_strategy": "best"},
        {**EVALUATED, "save_strategy": "best", "eval_strategy": "epoch", "per_device_train_batch_size": 8},
    ],
    ids=["only the model", "the best alone is kept", "no better one", "at the end of an epoch"],
)
def test_whatever_a_run_keeps_one_can_go_on_from_where_a_signal_ended_it(options, policy, tmp_path):
    """The first evaluation stays the best: no loss changes at such a rate."""

    def train(policy):
        trainer = SFTTrainer(
            policy, sft_config(tmp_path, max_steps=4, **options), demonstrations(16), demonstrations(8, seed=1)
        )
        trainer.add_callback(Send(signal.SIGTERM))
        given = {name: vars(trainer.args)[name] for name in options}
        try:
            trainer.train(resume_from_checkpoint="auto")
        except SystemExit:
            assert given == {name: vars(trainer.args)[name] for name in options}
            return None
        return trainer

    assert train(policy) is None and (tmp_path / "checkpoint-2").exists()
    resumed = train(policy)
    assert resumed.resume_step == 2 and resumed.finished
    evaluated = [entry["step"] for entry in resumed.state.log_history if "eval_loss" in entry]
    assert evaluated == sorted(set(evaluated)) and (2 in evaluated) == ("eval_strategy" in options)


def test_a_second_signal_ends_at_once(monkeypatch):
    sent, restored = [], []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append(number))
    monkeypatch.setattr(signal, "signal", lambda number, handler: restored.append((number, handler)))
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    callback = StopOnSignal(None)
    callback._handle(signal.SIGTERM, None)
    now[0] += 0.5
    callback._handle(signal.SIGTERM, None)  # the launcher's copy of the same one
    assert callback.stopped and not sent
    now[0] += 5
    callback._handle(signal.SIGTERM, None)
    assert sent == [signal.SIGTERM] and restored == [(signal.SIGTERM, signal.SIG_DFL)]


def test_two_runs_in_one_folder_are_refused(policy, tmp_path):
    with holding(tmp_path):
        with pytest.raises(TrainingError, match=f"another run trains in .*process {os.getpid()} on "):
            sft(policy, tmp_path).train()
    sft(policy, tmp_path).train()


def test_an_impossible_output_folder(policy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="nothing can be written in output_dir"), holding(tmp_path / "file" / "run"):
        pass
