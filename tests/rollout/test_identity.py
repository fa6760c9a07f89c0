"""Fingerprints: of all bytes, wherever they lie."""

from functools import partial

import pytest
import torch

from align.rollout.identity import bit_sums, fingerprint


@pytest.mark.parametrize("tell", [fingerprint, partial(fingerprint, sums=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_of_every_element_counts(tell, dtype):
    torch.manual_seed(0)
    tensor = torch.randn(7, 12).to(dtype)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    found = {tell(tensor)}
    for place in range(tensor.numel()):
        for bit in (0, 3, torch.iinfo(words).bits - 2):
            other = tensor.clone()
            other.view(words).view(-1)[place] ^= 1 << bit
            found.add(tell(other))
    assert len(found) == 1 + 3 * tensor.numel()
    assert tell(tensor) == tell(tensor.clone())


@pytest.mark.parametrize("tell", [fingerprint, bit_sums])
def test_order_counts(tell):
    tensor = torch.arange(24.0).view(4, 6)
    assert len({tell(x) for x in (tensor, tensor.flip(0), tensor.flip(1), tensor[[1, 0, 2, 3]])}) == 4


def test_slices_scalars_shapes_and_dtypes():
    tensor = torch.arange(24.0).view(4, 6)
    assert fingerprint(tensor[:, 1:3]) == fingerprint(tensor[:, 1:3].clone())
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))
    assert fingerprint(torch.zeros(4)) != fingerprint(torch.zeros(2, 2))
    assert fingerprint(torch.zeros(4)) != fingerprint(torch.zeros(8, dtype=torch.bfloat16))
