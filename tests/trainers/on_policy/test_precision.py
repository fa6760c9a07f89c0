"""On-policy training in bfloat16: the engine's dtype, the KL of the reward, FSDP2, what the log says of rounding."""

import pytest
import torch

from align.errors import TrainingError
from align.trainers.core.recorder import Recorder
from align.trainers.on_policy.metrics import OnPolicyMetrics
from tests.trainers.tiny_runs import logged, on_policy, prompts, wanted_words
from tests.trainers.two_processes import run_on_two


@pytest.mark.parametrize("asked, got", [(None, torch.bfloat16), ("float32", torch.float32)])
def test_the_engine_computes_in_what_the_policy_computes_in(policy, tmp_path, asked, got):
    cls, args = on_policy(
        "rloo",
        tmp_path,
        bf16=True,
        max_steps=1,
        rollout={"backend": "transformers", "dtype": asked},
        max_completion_length=4,
    )
    trainer = cls(policy, wanted_words, args, prompts(16))
    trainer.train()
    assert trainer.engine.engine.dtype == got
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_the_kl_of_the_reward_is_zero_before_any_update(policy, tmp_path, monkeypatch):
    """The engine's log-probs differ from the reference's by rounding; the sum over a completion would be a KL."""
    from align.trainers.on_policy import streams

    seen, make = [], streams.make_streams
    monkeypatch.setattr(streams, "make_streams", lambda *a: seen.extend(make(*a)) or make(*a))
    cls, args = on_policy("rloo", tmp_path, bf16=True, max_steps=1, beta=0.05)
    trainer = cls(policy, wanted_words, args, prompts(16))
    trainer.train()
    assert seen[0].beta == 0.05 and torch.equal(seen[0].logps, seen[0].ref_logps)
    assert logged(trainer, "rollout/mean_abs_logp_diff")[0] > 1e-4  # that of the engine is none of the KL
    assert logged(trainer, "rollout/p99_abs_logp_diff")[0] < 0.2
    assert logged(trainer, "kl") == [0]


def test_a_gap_is_a_warning_first_and_an_error_when_it_is_no_rounding(caplog):
    metrics = OnPolicyMetrics(Recorder(), torch.nn.Identity())
    batch = {"completion_mask": torch.ones(2, 50), "engine_logps": torch.zeros(2, 50)}
    logps = torch.full((2, 50), 0.01)
    logps[0, 0] = 5.0  # one token of a hundred: the mean is 0.06
    agree = lambda limits: metrics.engine_agrees(logps, batch, limits=limits, step=1, engine="vllm")  # noqa: E731
    agree((0.1, 0.3))
    assert not caplog.records
    agree((0.05, 0.3))
    agree((0.05, 0.3))
    assert len(caplog.records) == 1 and "99 % of them by less than 0.0100" in caplog.text
    with pytest.raises(TrainingError, match="0.0500 is allowed"):
        agree((0.01, 0.05))


def test_fsdp2_in_bfloat16_trains(policy, tmp_path):
    """An engine in float32 gets the weights that are trained, not those that the last pass was computed with."""
    kinds = ("transformers", "float32")
    first, second = run_on_two("tests.trainers.on_policy.bf16_ranks", tmp_path / "two", policy, *kinds)
    assert first.keys() == second.keys() == set(kinds)
    assert first["float32"]["engine"] == "torch.float32" and first["float32"]["rounded"] == []
    for run in [first["transformers"]]:
        assert run["engine"] == run["computes"] == "torch.bfloat16"
        steps = [entry for entry in run["logs"] if "loss" in entry]
        assert len(steps) == 2 and steps[0]["kl"] == 0
        # 0 on processors with bfloat16 instructions
        assert all(0 <= entry["rollout/mean_abs_logp_diff"] < 0.05 for entry in steps)
