"""Weights of tokens that a subclass of `SparsePOTrainer` gives."""

import json
import math
from dataclasses import replace

import pytest
import torch

from align.errors import TrainingError
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.sparse_runs import SparsePOTrainer, config
from tests.trainers.tiny_runs import assert_same, logged, parameters


class Own(SparsePOTrainer):
    """Weights of one's own: every second token."""

    def value(self, mask):
        return mask.cumsum(-1) % 2

    def forward(self, model, batch):
        policy, reference = super().forward(model, batch)
        weights = self.value(policy.mask)
        return replace(policy, m_u=weights, m_d=weights), reference


def own(policy, folder, value, **options) -> Own:
    trainer = Own(policy, config(folder, variant="mapo", **options), toy_pairs(16), toy_pairs(4, seed=1))
    trainer.value = value
    return trainer


def test_weights_of_ones_own_may_be_booleans_or_whole_numbers(policy, tmp_path):
    found = []
    for kind in (torch.float32, torch.bool, torch.int64):
        run = own(policy, tmp_path / str(kind), lambda mask, kind=kind: (mask.cumsum(-1) % 2).to(kind))
        run.train()
        found.append(parameters(run.model))
        assert logged(run, "mask_u_sparsity/chosen")
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    seen = json.loads((tmp_path / str(torch.bool) / "masks.json").read_text())["pairs"][0]["chosen"]["masks"]["m_u"]
    assert [str(value) for value in seen[:2]] == ["1.0", "0.0"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (lambda mask: -mask.float(), "m_u is below 0, or NaN, at some tokens"),
        (lambda mask: mask.float() * math.nan, "m_u is below 0, or NaN, at some tokens"),
        (lambda mask: mask.float().sum(-1, keepdim=True), "must have one shape"),
        (lambda mask: [1.0], "m_u must be a tensor"),
    ],
)
def test_weights_of_ones_own_that_mean_nothing(value, problem, policy, tmp_path):
    with pytest.raises(TrainingError, match=problem):
        own(policy, tmp_path, value).train()
