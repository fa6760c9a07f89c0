"""Weightings that ask for a reward that is not there, or for gradients that cannot be had."""

from types import SimpleNamespace

import pytest

from align.errors import ConfigError
from align.trainers.on_policy.streams import stream_scores
from align.trainers.weighting.base import TASK, Weighting, make_weighting
from align.trainers.weighting.updates import WeightingUpdates
from tests.trainers.tiny_runs import on_policy


class Misspelt(Weighting):
    def scores(self, rewards):
        return {TASK: rewards["shrot"]}

    def update(self, columns, lengths):
        return {"held": columns["shrot"].mean().item()}


def test_a_reward_that_is_not_there_is_named():
    sample = SimpleNamespace(left_out=False, rewards={"short": 1.0}, written=2)
    weighting, ranks = Misspelt(["short"], [1.0]), SimpleNamespace(gather=lambda rows: rows, index=0)
    updates = WeightingUpdates(weighting, ranks, None)
    for ask in (lambda: stream_scores(sample, weighting), lambda: updates.learn([sample], 1)):
        with pytest.raises(ConfigError, match="Misspelt asks for 'shrot', and no reward is called that: .* are short"):
            ask()


def test_single_gradients_under_reentrant_checkpointing_are_refused(tmp_path):
    """torch's RuntimeError ended the first rollout."""
    options = {"dynamic_weights": {"type": "gradient"}, "beta": 0.0, "gradient_checkpointing": True}
    for reentrant in (True, False):
        kwargs = {"use_reentrant": reentrant}
        args = on_policy("rloo", tmp_path, **options, gradient_checkpointing_kwargs=kwargs)[1]
        if not reentrant:
            assert make_weighting({"a": 1.0, "b": 1.0}, args).needs_gradients
            continue
        with pytest.raises(ConfigError, match="use_reentrant: true the gradients of single rewards.*GradientWeights"):
            make_weighting({"a": 1.0, "b": 1.0}, args)
