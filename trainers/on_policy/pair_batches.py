"""Micro-batches of pairs: the two completions of a pair, and all pairs of a prompt, are never in different ones."""

from itertools import pairwise

from align.data.batching import length_batches, packed_batches
from align.errors import RolloutError
from align.trainers.on_policy.batches import BatchPlanner, balance, sequence_tokens
from align.trainers.on_policy.samples import Sample

Group = list[Sample]
"""The pairs of one prompt: chosen, rejected, chosen, rejected ..."""


class PairPlanner(BatchPlanner):
    """As `BatchPlanner`, of samples that come in pairs: chosen, rejected, chosen, rejected ...

    A micro-batch to train on has its chosen samples first and then its rejected ones in the same order, as losses of
    pairs want them. Passes without gradient do not need pairs, and are planned as any samples are.
    """

    together = 2
    """Samples of a prompt."""

    def __init__(self, pad_token_id: int, *, num_generations: int, **options):
        """num_generations: of the rollout; `together` of a prompt's samples are left here."""
        super().__init__(pad_token_id, num_generations=self.together, **options)

    def plan(self, samples: list[Sample], batches: int) -> list[list[Sample]]:
        if self.tokens is not None:
            groups = in_groups(samples, self.together)
            sizes = [self.size(group) for group in groups]
            cut = packed_batches if self.shared_prefix else length_batches
            parts = self.even_out([[groups[i] for i in batch] for batch in cut(sizes, self.tokens)])
        else:
            parts = self._equal(samples, batches)
        return [in_halves(part) for part in parts]

    def size(self, group: Group) -> int:
        """Positions that a prompt takes: with a shared prompt its tokens, else rows of its longest sequence."""
        if self.shared_prefix:
            return len(group[0].prompt["prompt_ids"]) + sum(sample.length for sample in group)
        return len(group) * max(sequence_tokens(sample) for sample in group)

    def _equal(self, samples: list[Sample], batches: int) -> list[list[Group]]:
        """`batches` of about equal tokens with shared prompts, else of as many prompts of similar length."""
        if self.shared_prefix:
            return [in_groups(part, self.together) for part in balance(samples, batches, together=self.together)]
        groups = sorted(in_groups(samples, self.together), key=self.size)
        if len(groups) < batches:
            raise RolloutError(
                f"{len(groups)} pairs cannot fill {batches} micro-batches: lower gradient_accumulation_steps"
            )
        ends = [round(i * len(groups) / batches) for i in range(batches + 1)]
        return [groups[start:end] for start, end in pairwise(ends)]


def in_groups(samples: list[Sample], together: int) -> list[Group]:
    """Samples side by side -> those of each prompt."""
    return [samples[i : i + together] for i in range(0, len(samples), together)]


def in_halves(groups: list[Group]) -> list[Sample]:
    """The chosen samples of all pairs, and then the rejected ones; of several pairs per prompt first all first ones."""
    pairs = range(0, len(groups[0]), 2) if groups else ()
    return [group[pair + side] for side in (0, 1) for pair in pairs for group in groups]
