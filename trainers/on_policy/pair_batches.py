"""Micro-batches of pairs that the policy wrote: the two completions of a prompt are never in different ones."""

from itertools import pairwise

from align.data.batching import length_batches, packed_batches
from align.errors import RolloutError
from align.trainers.on_policy.batches import BatchPlanner, balance, sequence_tokens
from align.trainers.on_policy.samples import Sample

Pair = list[Sample]


class PairPlanner(BatchPlanner):
    """As `BatchPlanner`, of samples that come in pairs: chosen, rejected, chosen, rejected ...

    A micro-batch to train on has its chosen samples first and then its rejected ones in the same order, as losses of
    pairs want them. Passes without gradient do not need pairs, and are planned as any samples are.
    """

    def __init__(self, pad_token_id: int, *, num_generations: int, **options):
        """num_generations: of the rollout; two of a prompt's samples are left here."""
        super().__init__(pad_token_id, num_generations=2, **options)

    def plan(self, samples: list[Sample], batches: int) -> list[list[Sample]]:
        if self.tokens is not None:
            pairs = in_pairs(samples)
            sizes = [self.size(pair) for pair in pairs]
            cut = packed_batches if self.shared_prefix else length_batches
            parts = self.even_out([[pairs[i] for i in batch] for batch in cut(sizes, self.tokens)])
        else:
            parts = self._equal(samples, batches)
        return [in_halves(part) for part in parts]

    def size(self, pair: Pair) -> int:
        """Positions that a pair takes: with a shared prompt its tokens, else two rows of its longer sequence."""
        if self.shared_prefix:
            return len(pair[0].prompt["prompt_ids"]) + sum(sample.length for sample in pair)
        return 2 * max(sequence_tokens(sample) for sample in pair)

    def _equal(self, samples: list[Sample], batches: int) -> list[list[Pair]]:
        """`batches` of about equal tokens with shared prompts, else of as many pairs of similar length."""
        if self.shared_prefix:
            return [in_pairs(part) for part in balance(samples, batches, together=2)]
        pairs = sorted(in_pairs(samples), key=self.size)
        if len(pairs) < batches:
            raise RolloutError(
                f"{len(pairs)} pairs cannot fill {batches} micro-batches: lower gradient_accumulation_steps"
            )
        ends = [round(i * len(pairs) / batches) for i in range(batches + 1)]
        return [pairs[start:end] for start, end in pairwise(ends)]


def in_pairs(samples: list[Sample]) -> list[Pair]:
    """Samples side by side -> their pairs."""
    return [samples[i : i + 2] for i in range(0, len(samples), 2)]


def in_halves(pairs: list[Pair]) -> list[Sample]:
    """The chosen samples of the pairs, and then the rejected ones."""
    return [pair[side] for side in (0, 1) for pair in pairs]
