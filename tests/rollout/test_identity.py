"""Fingerprints: of all bytes, wherever they lie."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from align.rollout import identity
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


class Summed(TorchDispatchMode):
    """The most numbers that a sum, which torch widens to 64 bits first, has read at a time."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.sum:
            self.most = max(self.most, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_need_no_copy_of_the_tensor(dtype, monkeypatch):
    """Of the embedding of a 70B model in bfloat16 that was 8 GiB, beside an engine that fills the GPU."""
    tensor = torch.randn(100, 12).to(dtype)
    whole, wide = bit_sums(tensor), bit_sums(tensor.float())
    monkeypatch.setattr(identity, "SUMMED", 60)
    with Summed() as summed:
        assert bit_sums(tensor) == whole and bit_sums(tensor, torch.float32) == wide
    assert summed.most == 60
