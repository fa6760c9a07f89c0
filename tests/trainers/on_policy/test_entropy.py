"""The entropy bonus and the choice of tokens by their entropy."""

from types import SimpleNamespace

import pytest
import torch

from align.data import toy
from align.modeling.completions import completion_logps
from align.trainers.core.ranks import Ranks
from align.trainers.core.recorder import Recorder
from align.trainers.grpo import GRPOConfig, GRPOTrainer
from align.trainers.on_policy.entropy import EntropyBonus, train_high_entropy_tokens
from align.trainers.on_policy.samples import Sample
from tests.trainers.tiny_runs import (
    assert_same,
    logged,
    on_policy_config,
    parameters,
    prompts,
    tiny_model,
    wanted_words,
)


def trained(folder, resume=None, **options):
    args = on_policy_config(GRPOConfig, folder, **{"num_generations": 2, "per_device_train_batch_size": 4, **options})
    trainer = GRPOTrainer(
        tiny_model(toy.tokenizer()), wanted_words, args, prompts(16), processing_class=toy.tokenizer()
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.close()
    return trainer


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_the_loss_is_less_by_the_mean_entropy(kind, tmp_path):
    """Whatever the loss is divided by, and however a step is cut."""
    cuts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for options in ({}, cuts):
        args = {"per_device_train_batch_size": 4, "max_steps": 1, "entropy_coef": 0.5, "loss_type": kind, **options}
        config = on_policy_config(GRPOConfig, tmp_path, num_generations=2, **args)
        trainer = GRPOTrainer(
            tiny_model(toy.tokenizer()), wanted_words, config, prompts(16), processing_class=toy.tokenizer()
        )  # fmt: skip
        trainer.train()
        trainer.close()
        log = next(entry for entry in trainer.state.log_history if "policy_loss" in entry)
        assert log["policy_loss"] - log["loss"] == pytest.approx(0.5 * log["entropy"], rel=1e-4)
        assert log["entropy"] > 1 and log["entropy_coef"] == trainer.entropy_coef == 0.5


def test_the_loss_without_the_bonus_is_that_of_the_whole_step():
    """Of micro-batches of 3 and 5 sequences, whose losses are divided by the step's 8."""
    recorder, args = Recorder(), SimpleNamespace(has_entropy_bonus=True, use_adaptive_entropy=False, entropy_coef=0.5)
    bonus = EntropyBonus(args, Ranks(), recorder.record)
    bonus.count = 4.0  # tokens of the step
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    entropy = torch.tensor([[1.0, 3.0, 7.0]])
    losses = [bonus.added_to(torch.tensor(part / 8), entropy, mask, n, 8) for part, n in ((6.0, 3), (-2.0, 5))]
    assert [loss.item() for loss in losses] == pytest.approx([0.75 - 0.5 * 4 / 4, -0.25 - 0.5 * 4 / 4])
    assert recorder.take() == {"policy_loss": pytest.approx(0.5)}


def test_the_bonus_raises_the_entropy_of_what_was_drawn(tmp_path):
    """A step along its gradient alone: no score, no KL."""

    def none_is_better(completions, **columns):
        return [0.0] * len(completions)

    args = on_policy_config(
        GRPOConfig, tmp_path, num_generations=2, max_steps=1, beta=0.0, entropy_coef=0.1, learning_rate=1e-4
    )
    trainer = GRPOTrainer(
        tiny_model(toy.tokenizer()), none_is_better, args, prompts(8), processing_class=toy.tokenizer()
    )  # fmt: skip
    start = parameters(trainer.model)
    trainer.train()
    batch = trainer.planner.collate(trainer.buffer.samples)
    after = completion_logps(trainer.model, batch, return_entropy=True)[1].sum()
    trainer.model.load_state_dict(start)
    assert after > completion_logps(trainer.model, batch, return_entropy=True)[1].sum()
    trainer.close()


def test_an_adaptive_coefficient_follows_and_is_resumed(tmp_path):
    options = {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 50.0, "entropy_coef_max": 0.022}
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
    whole = trained(tmp_path, **options, **saving, per_device_train_batch_size=2)
    assert logged(whole, "entropy_coef") == pytest.approx([0.01, 0.015, 0.02, 0.022])
    again = trained(tmp_path, str(tmp_path / "checkpoint-2"), **options, **saving, per_device_train_batch_size=2)
    assert again.entropy_coef == whole.entropy_coef
    assert_same(parameters(whole.model), parameters(again.model))


def test_above_its_target_the_entropy_earns_nothing():
    options = {"has_entropy_bonus": True, "use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 1.0}
    args = SimpleNamespace(**options, entropy_coef_delta=0.05, entropy_coef_min=0.08, entropy_coef_max=1.0)
    bonus = EntropyBonus(args, Ranks(), lambda *values: None)
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    bonus.count = torch.tensor(2)
    for entropy, expected, coefficient in ((3.0, -0.3, 0.08), (0.5, 0.0, 0.13), (0.5, -0.065, 0.18)):
        assert bonus.term(torch.full((1, 3), entropy), mask).item() == pytest.approx(expected)
        bonus.on_step_end(None, None, None)
        assert bonus.coefficient == pytest.approx(coefficient)


def test_the_tokens_of_the_highest_entropy_keep_their_advantages():
    def sample(entropies, **options):
        count = len(entropies)
        made = Sample({}, [0] * count, "", [0.0] * count, False, 0, **options)
        made.entropies, made.advantages = torch.tensor(entropies), torch.ones(count, 1)
        return made

    samples = [sample([0.1, 3.0, 2.0]), sample([1.0, 0.2]), sample([9.0, 9.0], left_out=True)]
    train_high_entropy_tokens(samples, 0.4, Ranks())
    assert [s.advantages[:, 0].tolist() for s in samples[:2]] == [[0.0, 1.0, 1.0], [0.0, 0.0]]
    assert all(s.entropies is None for s in samples)
    few = [sample([0.1, 3.0])]
    train_high_entropy_tokens(few, 0.0, Ranks())
    assert few[0].advantages[:, 0].tolist() == [0.0, 1.0]


def test_a_run_on_the_tokens_of_the_highest_entropy(tmp_path):
    trainer = trained(tmp_path, top_entropy_quantile=0.25, beta=0.0)
    kept = [sample.advantages[:, 0] != 0 for sample in trainer.buffer.samples]
    signal = [rows for rows, s in zip(kept, trainer.buffer.samples, strict=True) if s.score]
    assert 0 < sum(int(rows.sum()) for rows in kept) <= -(-sum(len(rows) for rows in kept) // 4) and signal
