"""One token from log-probs and one uniform number."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from align.rollout.sampling import draw_tokens

LARGEST = 1 - 2**-53  # of numbers in [0, 1) in float64


def with_cut_tokens(size: int, scale: float) -> torch.Tensor:
    """log-probs [32, size], half of the tokens without probability."""
    generator = torch.Generator().manual_seed(size)
    logits = scale * torch.randn(32, size, generator=generator)
    logits[torch.rand(32, size, generator=generator) < 0.5] = -torch.inf
    logits[:, size // 2] = 0.0
    return logits.log_softmax(-1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("size", [1, 5, 128, 300, 4096])
def test_a_draw_is_the_inverse_of_the_distribution_function(size, scale):
    logps = with_cut_tokens(size, scale)
    cdf = logps.double().exp().cumsum(-1)
    cdf /= cdf[:, -1:].clone()
    edges = [torch.full((32,), number, dtype=torch.float64) for number in (0.0, LARGEST)]
    for uniforms in (torch.rand(32, dtype=torch.float64), *edges):
        tokens = draw_tokens(logps, uniforms)
        chosen = logps.gather(-1, tokens[:, None]).squeeze(-1)
        assert chosen.isfinite().all()  # none without probability
        above = cdf.gather(-1, tokens[:, None]).squeeze(-1)
        below = above - chosen.double().exp()
        assert ((below - 1e-6 <= uniforms) & (uniforms <= above + 1e-6)).all()


def test_the_share_of_a_rare_token_beside_a_common_one():
    """Within their block float32 would lose it: 1e-9 of what is before it."""
    logps = torch.tensor([[1.0 - 2e-9, 1e-9, 1e-9]], dtype=torch.float64).log().float()
    uniforms = 1 - torch.tensor([2.5e-9, 1.5e-9, 0.5e-9], dtype=torch.float64)
    assert draw_tokens(logps.expand(3, -1), uniforms).tolist() == [0, 1, 2]


def test_broken_log_probs_draw_a_token_of_the_vocabulary():
    """The engine then says what is wrong."""
    assert draw_tokens(torch.full((2, 300), torch.nan), torch.tensor([0.1, LARGEST], dtype=torch.float64)).max() < 300


def test_no_sums_over_the_whole_vocabulary_in_float64():
    """They took most of the time of a draw from 50,000 tokens."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                sizes.append(made.numel())
            return made

    with Watch():
        draw_tokens(with_cut_tokens(4096, 1.0), torch.rand(32, dtype=torch.float64))
    assert max(sizes) <= 32 * 128
