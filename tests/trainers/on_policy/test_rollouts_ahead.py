"""rollouts_ahead: 1. What is drawn when and by which weights, what a checkpoint keeps of it, and how it fails."""

import copy
import os
import signal
import threading
import time

import pytest
import torch
from transformers import TrainerCallback

from align.errors import ConfigError, RolloutError, TrainingError
from align.modeling.completions import completion_logps
from align.trainers.core.checkpoints import read_checkpoint
from tests.trainers.on_policy.elsewhere import PLACE, Elsewhere
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters, prompts, wanted_words

AHEAD = {"rollouts_ahead": 1, "rollout_correction": "token_truncate", "rollout": PLACE}


def make(policy, folder, method="rloo", rows=64, **options):
    trainer_class, args = on_policy(method, folder, **{**AHEAD, "learning_rate": 1e-2, **options})
    return trainer_class(policy, wanted_words, args, prompts(rows), prompts(4, seed=1) if args.do_eval else None)


def kept(trainer, into: list) -> None:
    """into: gets the samples of every rollout, as they are trained on, and the policy at its first step."""
    whole = trainer.make_rollout

    def make_rollout(rows, indices):
        into.append([None, copy.deepcopy(trainer.model)])
        into[-1][0] = whole(rows, indices)
        return into[-1][0]

    trainer.make_rollout = make_rollout


def test_the_next_rollout_is_drawn_while_this_one_trains(policy, tmp_path, monkeypatch):
    """Every call after the first waits until the loop has come to its update: it would wait for ever if the loop waited
    for it. The samples are of the policy of the rollout before, bit for bit those that it draws when asked then."""
    trainer, rollouts, training = make(policy, tmp_path, max_steps=5), [], threading.Event()
    kept(trainer, rollouts)
    update = trainer.compute_loss

    def compute_loss(*args, **options):
        training.set()
        return update(*args, **options)

    def before(call):
        if call > 1:
            assert training.wait(20), "the loop does not train while completions are drawn"
            training.clear()

    trainer.compute_loss = compute_loss
    monkeypatch.setattr(Elsewhere, "before", staticmethod(before))
    trainer.train()
    assert [[s.weight_version for s in buffer.samples] for buffer, _ in rollouts] == [
        [version] * 16 for version in (0, 0, 1, 2, 3)
    ]
    assert logged(trainer, "rollout/staleness") == [0, 1, 1, 1, 1]
    gaps, sizes = logged(trainer, "rollout/mean_abs_logp_diff"), logged(trainer, "rollout/effective_sample_size")
    assert gaps[0] < 1e-5 and min(gaps[1:]) > 1e-3 and sizes[0] > 1 - 1e-6 and max(sizes[1:]) < 1 - 1e-6
    for (buffer, _), (_, model) in zip(rollouts[2:], rollouts[1:], strict=False):
        batch = trainer.planner.collate(buffer.samples)
        with torch.no_grad():
            logps = completion_logps(model, batch, temperature=1.0)
        own = batch["completion_mask"].bool()
        torch.testing.assert_close(logps[own], batch["engine_logps"][own], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["rloo", "ppo"])
def test_where_nothing_is_learned_it_is_the_run_without(method, policy, tmp_path):
    """The same prompts with the same draws, over the end of an epoch, whose first rollout is not drawn ahead."""
    options = {"learning_rate": 0.0, "rows": 24, "max_steps": 5}
    if method == "ppo":
        options |= {"num_mini_batches": 2, "num_iterations": 2, "per_device_train_batch_size": 4, "max_steps": 16}
    found = []
    for ahead in (0, 1):
        trainer = make(policy, tmp_path / str(ahead), method, rollouts_ahead=ahead, **options)
        trainer.train()
        found.append([logged(trainer, key) for key in ("reward", "completions/mean_length", "loss", "entropy")])
    assert found[0][:2] == found[1][:2] and len(set(found[0][0])) > 2
    for a, b in zip(found[0][2:], found[1][2:], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    old = trainer.args.steps_per_rollout
    assert logged(trainer, "rollout/staleness") == [0, old, old, 0, old][: 5 if method == "rloo" else 4]


def test_kl_in_the_reward_is_that_of_the_policy_now(policy, tmp_path):
    """Not of the weights that drew, which know no step of the last rollout."""
    trainer, rollouts = make(policy, tmp_path, max_steps=3, beta=0.1), []
    kept(trainer, rollouts)
    fill, seen = trainer.forward.fill, []
    trainer.forward.fill = lambda parts, name, compute: seen.append(name) or fill(parts, name, compute)
    trainer.train()
    assert seen == ["ref_logps", "old_logps"] * 3


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_that_was_told_to_end_goes_on_exactly(steps, policy, tmp_path):
    """Inside a rollout and at its end; evaluations and checkpoints come while completions are drawn."""
    split = {} if steps == 1 else {"num_mini_batches": 2, "num_iterations": 2, "per_device_train_batch_size": 4}
    options = {"max_steps": 5 if steps == 1 else 9, "eval_strategy": "steps", "eval_steps": 2, **split}
    stopped = make(policy, tmp_path / "run", **options)
    stopped.add_callback(Terminate())
    with pytest.raises(SystemExit):
        stopped.train()
    assert not stopped.ahead.drawn  # nothing is left of it but the checkpoint's
    resumed = make(policy, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint="auto")
    straight = make(policy, tmp_path / "straight", **options)
    straight.train()
    assert resumed.resume_step == 3
    assert_same(parameters(resumed.model), parameters(straight.model))
    assert logged(resumed, "reward") == logged(straight, "reward")
    assert logged(resumed, "rollout/staleness") == logged(straight, "rollout/staleness")


def test_a_checkpoint_of_other_prompts_or_processes(policy, tmp_path, caplog):
    trainer = make(policy, tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    trainer.train()
    state = read_checkpoint(tmp_path / "checkpoint-2", rank=0, processes=1).state["ahead"]
    trainer.ahead.load_state_dict({**state, "processes": 2})
    assert not trainer.ahead.drawn and "drawn anew, by the weights of now" in caplog.text
    trainer.ahead.load_state_dict(state)
    rows = [trainer.train_dataset[i] for i in range(8)]
    with pytest.raises(TrainingError, match="for other prompts than those of step 3"):
        trainer.ahead.begin(rows, 2, lambda: None)


def test_a_failure_while_training_is_the_engines_own_and_comes_at_once(policy, tmp_path, monkeypatch):
    """Before the end of the step: it has eight micro-batches, and the second one finds it."""
    trainer, seen = (
        make(policy, tmp_path, max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=8),
        [],
    )
    update = trainer.compute_loss

    def compute_loss(*args, **options):
        seen.append(trainer.state.global_step)
        if trainer.ahead._thread is not None:
            trainer.ahead._thread.join(20)
        return update(*args, **options)

    def before(call):
        if call == 2:
            raise RolloutError("http://there:8000 did not answer /weight_info within 2 seconds")

    trainer.compute_loss = compute_loss
    monkeypatch.setattr(Elsewhere, "before", staticmethod(before))
    with pytest.raises(RolloutError, match="http://there:8000 did not answer"):
        trainer.train()
    assert seen == [0]


def test_an_interrupt_does_not_wait_for_completions(policy, tmp_path, monkeypatch):
    trainer = make(policy, tmp_path, max_steps=3)
    monkeypatch.setattr(Elsewhere, "before", staticmethod(lambda call: call == 1 or given_up().wait(60)))
    given_up = lambda: trainer.engine.current.given_up  # noqa: E731

    def compute_loss(*args, **options):
        raise KeyboardInterrupt

    trainer.compute_loss = compute_loss
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert time.monotonic() - start < 10
    assert not any(thread.name == "align-rollouts-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout": "transformers"}, "set rollout: {backend: server, urls: .*, not backend: transformers"),
        ({"rollout": "auto"}, "needs an engine outside this process"),
        ({"rollout_correction": "none"}, "set rollout_correction, such as token_truncate"),
        ({"dynamic_sampling_rounds": 1}, "dynamic_sampling_rounds draws again"),
        ({"rollouts_ahead": 2}, "rollouts_ahead"),
    ],
)
def test_what_cannot_be_drawn_ahead_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        on_policy("rloo", tmp_path, **{**AHEAD, **options})


def test_an_engine_in_this_process_is_refused(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(Elsewhere, "draws_elsewhere", False)
    with pytest.raises(ConfigError, match="engine elsewhere is in it"):
        make(policy, tmp_path, max_steps=2).train()
