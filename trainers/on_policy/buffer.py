"""A rollout that several optimiser steps are made from: its order, its mini-batches, and its place in a checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
from torch.utils.data import Sampler

from align.rollout.seeds import derive_seed
from align.trainers.on_policy.rollouts import Sample


class BlockSampler(Sampler[int]):
    """Prompts in blocks of one rollout each, every block repeated for the passes that are made over it.

    Trainer counts its steps and epochs by what the sampler yields. A rollout takes its prompts from the block's first
    repetition; the rest is drawn and not looked at. Prompts that do not fill a block wait for another epoch, in another
    order.
    """

    def __init__(self, rows: int, block: int, repetitions: int, seed: int, epoch: Callable[[], int]):
        self.rows, self.block, self.repetitions, self.seed, self.epoch = rows, block, repetitions, seed, epoch

    def __len__(self) -> int:
        return self.rows // self.block * self.block * self.repetitions

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch()]).permutation(self.rows)
        for start in range(0, self.rows // self.block * self.block, self.block):
            for _ in range(self.repetitions):
                yield from order[start : start + self.block].tolist()


class RolloutBuffer:
    """The samples of one rollout on this process, in mini-batches of one optimiser step each.

    A mini-batch is a slice of the global batch of prompts, so that it does not depend on the number of processes; the
    passes after the first take the mini-batches in another order.
    """

    def __init__(self, mini_batches: list[list[Sample]], seed: int, number: int):
        self.mini_batches, self.seed, self.number = mini_batches, seed, number

    @property
    def samples(self) -> list[Sample]:
        return [sample for mini_batch in self.mini_batches for sample in mini_batch]

    def mini_batch(self, position: int) -> list[Sample]:
        """The samples of the optimiser step at this position, counted from the rollout's first."""
        count = len(self.mini_batches)
        iteration, place = divmod(position, count)
        if iteration == 0 or count == 1:
            return self.mini_batches[place]
        order = np.random.default_rng(derive_seed(self.seed, "order", self.number, iteration)).permutation(count)
        return self.mini_batches[order[place]]

    def state_dict(self) -> dict:
        return {
            "number": self.number,
            "mini_batches": [[asdict(sample) for sample in batch] for batch in self.mini_batches],
        }

    @classmethod
    def from_state(cls, state: dict, seed: int) -> "RolloutBuffer":
        return cls([[Sample(**sample) for sample in batch] for batch in state["mini_batches"]], seed, state["number"])
