"""A run whose reward models are on one rank each is that of a run with all of them everywhere, to the bit."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.trainers.tiny_runs import assert_same
from tests.trainers.two_processes import run_on_two


@pytest.fixture(scope="module")
def runs(policy, tokenizer, tmp_path_factory):
    """By rank."""
    folder = tmp_path_factory.mktemp("placed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, initializer_range=0.3, num_labels=1, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        LlamaForSequenceClassification(config).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return run_on_two("tests.trainers.on_policy.placed_runs", folder, policy, str(folder / "rm"))


@pytest.mark.parametrize("names", [("everywhere", "placed"), ("placed", "resumed"), ("refill", "placed refill")])
def test_a_run_with_placed_rewards(runs, names):
    for run in runs:
        expected, found = (run[name] for name in names)
        assert_same(found["weights"], expected["weights"])
        assert found["logs"] == expected["logs"] and len(found["logs"]["loss"]) == 3
        assert found["placed"] == ([True, False, True] if "refill" in names[1] else [True, True])
    assert len(set(runs[0]["placed"]["logs"]["eval_gold"])) == 3


def test_ranks_without_a_prompt_to_refill_take_part(runs):
    assert max(runs[0]["placed refill"]["logs"]["dynamic_sampling/rounds"]) > 0
    assert any(run["placed refill"]["joined"] for run in runs)
