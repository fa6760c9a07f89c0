"""Models with a state beside keys and values, in the engine of transformers: rows leave a batch, share prompts."""

import pytest

from align.errors import ConfigError, RolloutError
from align.rollout import SamplingParams
from align.rollout.make import make_engine
from tests.modeling.test_prefix_support import hybrid
from tests.rollout.rollout_models import is_greedy, prompts


@pytest.mark.parametrize("name", ["FalconH1", "NemotronH", "Lfm2", "Jamba"])
def test_rows_of_a_hybrid_are_those_of_the_model(name):
    """Of different lengths, two with one prompt, and some that end long before others."""
    model = hybrid(name).eval()
    engine = make_engine(model, backend="transformers", max_model_len=40)
    ids = [[token % 60 + 3 for token in prompt] for prompt in prompts([3, 9, 5, 3])]
    params = [SamplingParams(length, temperature=0) for length in (3, 9, 6, 12, 5)]
    rollouts = engine.generate([*ids, ids[0]], params)
    engine.close()
    assert all(is_greedy(model, r.prompt_ids, r.completions[0].token_ids) for r in rollouts)


@pytest.mark.parametrize("name", ["Rwkv", "Mamba2", "RecurrentGemma", "MiniMax"])
def test_a_model_whose_cache_is_not_for_padded_rows_is_refused(name):
    # of Mamba2 transformers 5.24 gives the usual cache, whose padded rows the probe then refuses, as those of MiniMax
    refused = f"{name}ForCausalLM keeps what it has read .*use rollout.backend: vllm|does not compute what the trainer"
    with pytest.raises((ConfigError, RolloutError), match=refused):
        make_engine(hybrid(name).eval(), backend="transformers", max_model_len=40)
