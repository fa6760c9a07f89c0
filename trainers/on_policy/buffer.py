"""A rollout that several optimiser steps use: the prompts it takes, its mini-batches, its state in checkpoints."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from align.data.streams import is_stream
from align.errors import ConfigError, TrainingError
from align.rollout.seeds import derive_seed
from align.rollout.types import Episode, plain
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.samples import Sample

logger = logging.getLogger(__name__)


class BlockSampler(Sampler[int]):
    """Prompts in blocks of one rollout each, every block repeated for the passes that are made over it.

    Trainer counts its steps and epochs by what the sampler yields. A rollout takes its prompts from the block's first
    repetition; the rest is drawn and ignored. Prompts that do not fill a block wait for another epoch, in another
    order. seed: of the orders; None: as the prompts come.
    """

    def __init__(self, rows: int, block: int, repetitions: int, seed: int | None, epoch: Callable[[], int]):
        self.rows, self.block, self.repetitions, self.seed, self.epoch = rows, block, repetitions, seed, epoch

    def __len__(self) -> int:
        return self.rows // self.block * self.block * self.repetitions

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            order = np.arange(self.rows)
        else:
            order = np.random.default_rng([self.seed, self.epoch()]).permutation(self.rows)
        for start in range(0, self.rows // self.block * self.block, self.block):
            for _ in range(self.repetitions):
                yield from order[start : start + self.block].tolist()


def block_sampler(args: OnPolicyConfig, rows: int, step: Callable[[], int]) -> BlockSampler:
    """Of a run whose rollouts are made several steps from. step: called for the optimiser step that an epoch begins
    with."""
    shuffled = args.seed if args.data_seed is None else args.data_seed
    seed = None if args.train_sampling_strategy == "sequential" else shuffled
    block = args.prompts_per_rollout
    steps_per_epoch = rows // block * args.steps_per_rollout
    return BlockSampler(rows, block, args.num_iterations, seed, lambda: step() // steps_per_epoch)


def take_prompts(
    epoch_iterator: Iterator[list[dict]], num_batches: int, args: OnPolicyConfig
) -> tuple[list[dict], list[int]]:
    """The prompts of a rollout on this process, and their indices in its global batch. num_batches: micro-batches of an
    optimiser step."""
    prompts: list[dict] = []
    indices: list[int] = []
    for number, batch in enumerate(islice(epoch_iterator, num_batches * args.steps_per_rollout)):
        if number >= num_batches * args.num_mini_batches:
            continue  # the block's repetitions, one for each further pass
        # accelerate gives whole batches to the processes in turn
        first = (number * args.world_size + args.process_index) * args.train_batch_size
        prompts += batch
        indices += range(first, first + len(batch))
    return prompts, indices


def check_arithmetic(args: OnPolicyConfig, rows: int) -> None:
    """Log what a rollout consists of; raises `ConfigError` when there are fewer prompts than one takes."""
    prompts = args.prompts_per_rollout
    if rows < prompts:
        times = f" x num_mini_batches {args.num_mini_batches}" if args.num_mini_batches > 1 else ""
        raise ConfigError(
            f"{rows} prompts are fewer than the {prompts} of one step "
            f"(per_device_train_batch_size {args.train_batch_size} x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x {args.world_size} processes{times}): lower one of them"
        )
    if args.process_index == 0:
        steps = args.steps_per_rollout
        logger.info(
            "each %s: %d prompts x %d samples -> %d sequences -> %d optimiser step%s",
            "step" if steps == 1 else "rollout",
            prompts,
            args.num_generations,
            prompts * args.num_generations,
            steps,
            "" if steps == 1 else "s",
        )


def check_stream(args: OnPolicyConfig, prompts: Any) -> None:
    """Raises `ConfigError` for options that go back over the prompts, or choose among all of them, if these are a
    stream."""
    if not is_stream(prompts):
        return
    for name, asked in (
        ("num_iterations", args.num_iterations > 1),
        ("dynamic_sampling_rounds", args.dynamic_sampling_rounds),
    ):
        if asked:
            raise ConfigError(
                f"{name}: the prompts are a stream, which is read once from its start: leave it out, or make a dataset "
                "of the prompts",
                key=name,
            )


class RolloutBuffer:
    """The samples of one rollout on this process, in mini-batches of one optimiser step each.

    A mini-batch is a slice of the global batch of prompts, so that it does not depend on the number of processes; the
    passes after the first take the mini-batches in another order.
    """

    def __init__(self, mini_batches: list[list[Sample]], seed: int, number: int):
        self.mini_batches, self.seed, self.number = mini_batches, seed, number

    @classmethod
    def of(cls, samples: list[Sample], mini_batches: int, seed: int, number: int) -> "RolloutBuffer":
        """mini_batches: their number. samples: in order, all of a prompt. number: of the rollout's first step."""
        size = -(-len(samples) // mini_batches)
        return cls([samples[i : i + size] for i in range(0, len(samples), size)], seed, number)

    @property
    def stale(self) -> bool:
        """Whether it was drawn by weights before those of the rollout's first step."""
        return self.mini_batches[0][0].weight_version != self.number

    @property
    def samples(self) -> list[Sample]:
        return [sample for mini_batch in self.mini_batches for sample in mini_batch]

    def mini_batch(self, position: int) -> list[Sample]:
        """The samples of the optimiser step at this position, counted from the rollout's first."""
        count = len(self.mini_batches)
        iteration, index = divmod(position, count)
        if iteration == 0 or count == 1:
            return self.mini_batches[index]
        order = np.random.default_rng(derive_seed(self.seed, "order", self.number, iteration)).permutation(count)
        return self.mini_batches[order[index]]

    def state_dict(self, processes: int) -> dict:
        """This process's share of the rollout. processes: the number of all."""
        return {
            "processes": processes,
            "number": self.number,
            "mini_batches": [plain(batch) for batch in self.mini_batches],
        }

    @classmethod
    def from_state(cls, state: dict, seed: int, *, processes: int) -> "RolloutBuffer":
        """Raises `TrainingError` when the rollout was shared by another number of processes: samples would be left out
        of the rest of its steps, or be missing."""
        if state["processes"] != processes:
            raise TrainingError(
                f"the checkpoint is inside a rollout that {state['processes']} processes share, and {processes} resume "
                f"it: each process has its own part. Resume with {state['processes']} processes, or from a checkpoint "
                "at the end of a rollout (save_steps a multiple of num_mini_batches x num_iterations)"
            )
        return cls([[restored(sample) for sample in batch] for batch in state["mini_batches"]], seed, state["number"])


def restored(sample: dict) -> Sample:
    """A sample of `plain`."""
    episode = sample.get("episode")
    return Sample(**{**sample, "episode": None if episode is None else Episode(**episode)})


def check_position(buffer: RolloutBuffer | None, step: int, steps_per_rollout: int) -> None:
    """Of a resumed run: the checkpoint must hold a rollout if, and only if, its step is inside one."""
    if (buffer is not None) != bool(step % steps_per_rollout):
        raise TrainingError(
            "the checkpoint was written with other num_mini_batches or num_iterations: its rollout cannot be "
            "continued. Resume with the settings of the run"
        )
