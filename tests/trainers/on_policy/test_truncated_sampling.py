"""top_p, top_k and min_p: what is drawn, and log-probs of the whole policy all the same."""

import pytest
import torch

from align.errors import ConfigError, TrainingError
from align.modeling.completions import completion_logps
from align.trainers.remax import ReMaxConfig
from tests.trainers.tiny_runs import logged, on_policy, on_policy_config, prompts, wanted_words


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}])
def test_mistakes_are_told(options, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(options))):
        on_policy_config(ReMaxConfig, tmp_path, **options)


def test_only_likely_tokens_are_drawn_and_the_policy_is_whole(policy, tmp_path):
    trainer_class, args = on_policy("remax", tmp_path, top_k=3, temperature=0.8, beta=0.1)
    trainer = trainer_class(policy, wanted_words, args, prompts(8))
    assert trainer.kl_needs_policy()
    made = []
    plan = trainer.planner.plan_forward
    trainer.planner.plan_forward = lambda samples, size: made.append(samples) or plan(samples, size)
    rows = [trainer.train_dataset[i] for i in range(8)]
    trainer.make_rollout(rows, list(range(8)))
    samples = made[0]
    batch = trainer.planner.collate(samples)
    with torch.no_grad():
        logps = completion_logps(trainer.model, batch, temperature=0.8)
    for sample, row in zip(samples, logps, strict=True):
        row = row[: sample.length]
        assert (torch.tensor(sample.engine_logps) > row + 0.1).all()  # of 3 tokens, not of all
        # kl_mode to_go: advantage_t = r - r_greedy - beta * the KL of the tokens from t on, 0 at the first step
        torch.testing.assert_close(sample.advantages[:1].expand_as(sample.advantages), sample.advantages)
    trainer.train()
    assert logged(trainer, "rollout/mean_abs_logp_diff")[0] < 1e-5 and logged(trainer, "kl")[0] == pytest.approx(
        0, abs=1e-5
    )
    evaluated = trainer.evaluator._sample(rows, list(range(8)), [])
    assert all(min(sample.engine_logps) > -4 for sample in evaluated)


def test_an_engine_below_the_policy_is_found(policy, tmp_path):
    trainer_class, args = on_policy("remax", tmp_path, top_p=0.9)
    trainer = trainer_class(policy, wanted_words, args, prompts(8))
    mask = torch.ones(1, 2)
    check = trainer.metrics.engine_agrees
    above, below = ({"completion_mask": mask, "engine_logps": torch.full((1, 2), x)} for x in (-0.5, -1.5))
    limits = {"limits": (0.01, 0.1), "step": 1, "engine": "some"}
    check(-mask, above, **limits, truncated=True)
    with pytest.raises(TrainingError, match=r"differ by 0\.5000"):
        check(-mask, below, **limits, truncated=True)
    with pytest.raises(TrainingError, match=r"differ by 0\.5000"):
        check(-mask, above, **limits)


def test_a_penalty_is_weighed_and_not_judged(policy, tmp_path):
    """Log-probs of the engine are of what was drawn, the KL of the policy without the penalty."""
    with pytest.raises(ConfigError, match="set rollout_correction, such as token_truncate"):
        on_policy("rloo", tmp_path, repetition_penalty=1.5)
    options = {"repetition_penalty": 1.5, "rollout_correction": "token_truncate", "beta": 0.1}
    trainer_class, args = on_policy("rloo", tmp_path, **options)
    trainer = trainer_class(policy, wanted_words, args, prompts(16))
    assert trainer.kl_needs_policy()
    trainer.train()
    assert logged(trainer, "rollout/mean_abs_logp_diff")[0] > 0.01 and logged(trainer, "kl")[0] == pytest.approx(
        0, abs=1e-5
    )
    assert logged(trainer, "rollout/effective_sample_size")[0] < 0.999
