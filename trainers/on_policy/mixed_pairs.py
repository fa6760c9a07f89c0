"""An offline and an online pair of each prompt, side by side: what MetaAPO's rollouts consist of.

A prompt that has no online pair is in no loss. It stays in the rollout, with its offline pair twice and left out, so
that all processes have as many prompts; micro-batches leave out what they can of these.
"""

from dataclasses import replace

import torch
from torch import Tensor

from align.trainers.on_policy.pair_batches import Group, PairPlanner, in_groups
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.samples import Sample


def offline_pairs(prompts: list[dict], step: int) -> list[Sample]:
    """The chosen and the rejected answer of each row as samples, side by side."""
    return [_offline(prompt, name, step) for prompt in prompts for name in ("chosen", "rejected")]


def _offline(prompt: dict, name: str, step: int, **fields) -> Sample:
    """engine_logps: 0, as no engine drew it, and nothing looks at them."""
    ids = list(prompt[f"{name}_ids"])
    return Sample(prompt, ids, prompt.get(name, ""), [0.0] * len(ids), truncated=False, weight_version=step, **fields)


def with_fillers(rollout: ScoredRollout, prompts: list[dict], places: list[int], step: int) -> ScoredRollout:
    """A rollout of all prompts out of that of some of them: the others have samples that are left out. places: which of
    the prompts it is of, in order; nothing of it is taken where there are none."""
    each = len(rollout.samples) // len(rollout.extra)
    samples = [s for prompt in prompts for s in [_offline(prompt, "chosen", step, left_out=True)] * each]
    for number, place in enumerate(places):
        samples[place * each : (place + 1) * each] = rollout.samples[number * each : (number + 1) * each]
    return ScoredRollout(samples, [[] for _ in prompts], rollout.weight_version)


def mixed_groups(offline: list[Sample], online: list[Sample]) -> list[Sample]:
    """Of each prompt the offline pair and then the online one: chosen, rejected, chosen, rejected. offline, online: the
    pairs of the prompts, side by side; an online one may be left out (`make_pairs`), and with it the prompt is."""
    samples: list[Sample] = []
    for old, new in zip(in_groups(offline, 2), in_groups(online, 2), strict=True):
        if new[0].left_out or new[1].left_out:
            old = new = [replace(sample, left_out=True) for sample in old]
        samples += [*old, *new]
    return samples


def online_rows(rows: int) -> Tensor:
    """Which rows of a micro-batch are of online pairs; its rows are those of `in_halves`."""
    quarter = rows // 4
    return torch.cat([torch.arange(quarter, 2 * quarter), torch.arange(3 * quarter, 4 * quarter)])


class MixedPlanner(PairPlanner):
    """As `PairPlanner`, of two pairs per prompt, without the prompts that are left out."""

    together = 4

    def plan(self, samples: list[Sample], batches: int) -> list[list[Sample]]:
        groups = self.kept(in_groups(samples, self.together), batches if self.tokens is None else 1)
        return super().plan([sample for group in groups for sample in group], batches)

    def new_pairs(self, samples: list[Sample]) -> list[Sample]:
        """The online pairs of a rollout whose log-probs are to be computed, side by side."""
        return [sample for group in self.kept(in_groups(samples, self.together), 1) for sample in group[2:]]

    def kept(self, groups: list[Group], least: int) -> list[Group]:
        """The prompts that count, and of the others the first, until there are as many on every process and no fewer
        than `least`: all make the same passes."""
        counted = [group for group in groups if not group[0].left_out]
        number = max(least, int(self.ranks.gather(torch.tensor([len(counted)])).max()))
        others = [group for group in groups if group[0].left_out]
        return counted + others[: max(0, number - len(counted))]
