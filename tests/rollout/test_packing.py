"""Tensors in one block of bytes, and a group of processes that a block is broadcast to."""

import threading

import pytest
import torch
from torch.distributed import TCPStore

from align.errors import RolloutError
from align.rollout.server.group import Group, meeting_point, own_address
from align.rollout.server.packing import ALIGNED, Block, packs, room, unpack
from tests.rollout.rollout_models import needs_vllm

TENSORS = [
    ("a", torch.arange(6, dtype=torch.float32).view(2, 3)),
    ("b", torch.tensor(7, dtype=torch.int64)),
    ("c", torch.randn(5).bfloat16()),
    ("d", torch.empty(0, 4, dtype=torch.float16)),
    ("e", torch.randn(8, 6)[:, ::2]),
    ("f", torch.tensor([True, False, True])),
    ("g", torch.randn(3).double()),
]


def test_what_is_packed_comes_out_again():
    block = Block("cpu", size=64)
    bytes_, outline = block.pack(TENSORS)
    assert bytes_.dtype == torch.uint8 and bytes_.numel() == sum(room(t) for _, t in TENSORS)
    assert all(start % ALIGNED == 0 for *_, start in outline)
    for (name, tensor), (found_name, found) in zip(TENSORS, unpack(bytes_, outline), strict=True):
        assert name == found_name and found.dtype == tensor.dtype and torch.equal(found, tensor), name
    memory = block.bytes.data_ptr()
    block.pack(TENSORS[:2])
    assert block.bytes.data_ptr() == memory  # written anew, not made anew


def test_packs_keep_their_limit_and_lose_nothing():
    groups = list(packs(iter(TENSORS), 40))
    assert [name for group in groups for name, _ in group] == list("abcdefg")
    for group in groups:
        assert len(group) == 1 or sum(room(t) for _, t in group) <= 40
    assert len(groups) > 2 and list(packs([], 40)) == []


def test_a_group_broadcasts_and_gives_up_in_time():
    """Two members as threads. The second time nobody sends: the wait has an end, and its error says so."""
    address = own_address("127.0.0.1")
    assert address == "127.0.0.1"
    store, groups, failures = meeting_point(address, 20), {}, []

    def join(rank: int) -> None:
        own = TCPStore(address, store.port, is_master=False) if rank else store  # one that waits has its store locked
        groups[rank] = Group("gloo", own, rank, 2, 1.0, address)
        block = torch.arange(9, dtype=torch.uint8) if rank == 0 else torch.zeros(9, dtype=torch.uint8)
        groups[rank].broadcast(block)
        assert block.tolist() == list(range(9))
        if rank == 1:
            with pytest.raises(RolloutError, match="could not be broadcast over gloo"):
                groups[1].broadcast(block)
            failures.append("waited")

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == ["waited"]
    for group in groups.values():
        group.close()


def test_a_group_that_nobody_joins_is_given_up():
    with pytest.raises(RolloutError, match="could not form a group over gloo"):
        Group("gloo", meeting_point("127.0.0.1", 1), 0, 2, 1.0, "127.0.0.1")


@needs_vllm
def test_only_our_trainers_send_to_our_servers():
    from align.rollout.server.worker import Receiver

    with pytest.raises(RolloutError, match="only a run of align"):
        Receiver.trainer_send_weights(iter(()), {})
