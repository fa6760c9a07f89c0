"""Masks from pairs that share their prompt in one row are those from padded rows."""

import pytest
import torch

from align.data.shared_prefix import SharedPrefixCollator
from align.modeling.activation_masks import watch_activations
from align.modeling.pairs import completions, pair_tokens
from align.modeling.prefix_support import enable_shared_prefix
from align.modeling.token_masks import watch_states
from tests.modeling.pair_batches import model, pairs, rows


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_states_and_activations(kind):
    core = model(kind)
    assert enable_shared_prefix(core, 16) is None
    found = []
    for batch in (pairs(), SharedPrefixCollator()(rows())):
        places = completions(batch)
        with torch.no_grad(), watch_states(core, places) as states, watch_activations(core, places) as seen:
            tokens = pair_tokens(core, batch)
        found.append((*states, seen.mask(), tokens.logps))
    for padded, shared in zip(*found, strict=True):
        torch.testing.assert_close(padded, shared, rtol=1e-5, atol=1e-5)  # norms are in float32
