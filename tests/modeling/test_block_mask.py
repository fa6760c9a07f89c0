"""The block mask of shared prefixes, made from lengths, against torch's own, made from all pairs of positions."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from align.modeling import shared_prefix

FIELDS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip


def random_table(seed):
    """Groups of any size, rests that are empty, segments that end and begin at block borders."""
    draw = torch.Generator().manual_seed(seed)
    groups, rests, longest = (int(torch.randint(1, top, (1,), generator=draw)) for top in (6, 5, 500))
    table = torch.randint(0, longest, (groups, 1 + rests), generator=draw)
    rounded = torch.rand(table.shape, generator=draw) < 0.3
    table[rounded] = (table[rounded] // 128) * 128
    table[:, 0].clamp_(min=1)
    table[:, 2:] *= torch.rand(groups, rests - 1, generator=draw) < 0.7
    return table[None, None]


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_dense_mask(seed):
    table = random_table(seed)
    count = int(table.sum())
    seen = shared_prefix.visible(table)
    expected = create_block_mask(seen, B=None, H=None, Q_LEN=count, KV_LEN=count, device="cpu")
    actual = shared_prefix.block_mask(table, count)
    assert actual.seq_lengths == expected.seq_lengths and actual.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in FIELDS:
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


MEASURE = """
import resource, sys, torch
from align.modeling.shared_prefix import block_mask
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
n = int(sys.argv[1])
block_mask(torch.tensor([[[[64, 32, 32]]]]))
before = peak()
mask = block_mask(torch.tensor([[[[512] + [(n - 512) // 8] * 8]]]))
print(int(mask.seq_lengths[0]), peak() - before)
"""


@pytest.mark.parametrize("tokens, most", [(16_384, 16), (65_536, 64)])
def test_memory(tokens, most):
    """MiB of the process, for a prompt of 512 tokens with 8 samples. Densely: 2.5 and 40 GiB."""
    out = subprocess.run([sys.executable, "-c", MEASURE, str(tokens)], capture_output=True, text=True, check=True)
    count, used = map(int, out.stdout.split())
    assert count == tokens and used < most * 2**20


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (14, 2), (5, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_equals_group_by_group(heads, key_heads, softcap):
    """For numbers of heads that are no powers of two, with and without a soft cap. (Gradients: tests/device.)"""
    table = torch.tensor([[[[70, 40, 30], [10, 64, 0]]]])
    count = int(table.sum())
    torch.manual_seed(0)
    inputs = [torch.randn(1, h, count, 16) for h in (heads, key_heads, key_heads)]
    options = {"scale": 0.3, "softcap": softcap}
    actual = shared_prefix.flex(*inputs, shared_prefix.block_mask(table), **options)
    expected = shared_prefix.group_by_group(*inputs, shared_prefix._segments(table), **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
