"""Micro-batches of samples, in two layouts: rows that share their prompts, or one padded row for each sample."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.data.batching import length_batches, packed_batches
from align.errors import RolloutError
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.samples import Sample, completion_masks, completion_matrix

PER_TOKEN = ("engine_logps", "ref_logps", "old_logps", "advantages", "values", "returns")


class BatchPlanner:
    """Cuts samples into micro-batches, and makes tensors of them.

    Without a budget the caller gives the number of micro-batches, and with shared prefixes a prompt's samples stay
    together. A budget is the largest number of tokens of a micro-batch (padding counted); the samples of a prompt may
    then be in several. All processes make the same number of them, as gradients are summed and weights gathered in
    step.

    Args:
        num_generations: samples of a prompt, side by side.
        shared_prefix: whether the samples of a prompt share its computation (`resolve_layout`).
        tokens: budget of a micro-batch that is trained on. forward_tokens: of one without gradient.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        num_generations: int,
        shared_prefix: bool,
        tokens: int | None = None,
        forward_tokens: int | None = None,
        ranks: Ranks | None = None,
    ):
        self.pad_token_id, self.num_generations, self.shared_prefix = pad_token_id, num_generations, shared_prefix
        self.tokens, self.forward_tokens, self.ranks = tokens, forward_tokens, ranks or Ranks()

    def plan(self, samples: list[Sample], batches: int) -> list[list[Sample]]:
        """Micro-batches to train on: `batches` of about equal tokens, or by the budget. RolloutError when there are
        too few samples."""
        if self.tokens is not None:
            return self._within(samples, self.tokens)
        if self.shared_prefix:
            return balance(samples, batches, self.num_generations)
        return split_by_length(samples, batches)

    def plan_forward(self, samples: list[Sample], size: int) -> list[list[Sample]]:
        """Micro-batches for passes without gradient: of about `size` samples, or by the budget."""
        if self.forward_tokens is not None:
            return self._within(samples, self.forward_tokens)
        count = max(1, -(-len(samples) // size))
        return balance(samples, count, self.num_generations) if self.shared_prefix else split_by_length(samples, count)

    def plan_evaluation(self, samples: list[Sample], size: int) -> list[list[Sample]]:
        """The same for the samples of an evaluation, which come one at a time."""
        if self.forward_tokens is not None:
            return self._within(samples, self.forward_tokens)
        return split_by_length(samples, -(-len(samples) // size))

    def _within(self, samples: list[Sample], budget: int) -> list[list[Sample]]:
        return self.even_out(pack(samples, budget) if self.shared_prefix else pad_within(samples, budget))

    def even_out(self, parts: list[list]) -> list[list]:
        """As many parts on every process: the largest are halved."""
        count = int(self.ranks.gather(torch.tensor([len(parts)])).max())
        while len(parts) < count:
            largest = max(range(len(parts)), key=lambda i: len(parts[i]))
            whole = parts[largest]
            parts[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
        return parts

    def collate(self, samples: list[Sample]) -> dict[str, Tensor]:
        return collate(samples, self.pad_token_id, shared_prefix=self.shared_prefix)

    def collate_states(self, samples: list[Sample]) -> dict[str, Tensor]:
        """As `collate`, without what is per token, and with one more state of each sample in completion_sources,
        [B, L + 1]: the one after its last token."""
        return shared(samples, 1) if self.shared_prefix else padded(samples, self.pad_token_id, 1)


def collate(samples: list[Sample], pad_token_id: int, *, shared_prefix: bool = False) -> dict[str, Tensor]:
    """Samples -> tensors. B samples, L tokens of the longest completion; what is per token is left-aligned.

    input_ids, attention_mask (with shared_prefix: position_ids): what the model gets, see `padded` and `shared`.
    completion_ids, completion_mask (1.0 on the completion's tokens): [B, L].
    completion_sources: [B, L], the position that predicts each token (the one before it), counted through the flattened
    positions of input_ids; 0 outside the mask.
    Those of `PER_TOKEN` that the samples have: [B, L] (or [B, L, streams]), 0 outside the mask.
    """
    ids = [torch.tensor(sample.completion_ids) for sample in samples]
    batch = {
        **(shared(samples) if shared_prefix else padded(samples, pad_token_id)),
        "completion_ids": pad_sequence(ids, batch_first=True),
        "completion_mask": completion_masks(samples),
    }
    for name in PER_TOKEN:
        column = getattr(samples[0], name)
        if column is not None and len(column):
            batch[name] = completion_matrix(samples, name)
    return batch


def padded(samples: list[Sample], pad_token_id: int, after: int = 0) -> dict[str, Tensor]:
    """input_ids, attention_mask: [B, T], prompt and completion of each sample, padded on the right. after: states in
    completion_sources after the last token, 0 or 1."""
    sequences = [torch.tensor(sample.prompt["prompt_ids"] + sample.completion_ids) for sample in samples]
    input_ids = pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(ids) for ids in sequences])
    sources = []
    for i, sample in enumerate(samples):
        start = i * input_ids.shape[1] + len(sample.prompt["prompt_ids"]) - 1
        sources.append(torch.arange(start, start + sample.length + after))
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "completion_sources": pad_sequence(sources, batch_first=True),
    }


def shared(samples: list[Sample], after: int = 0) -> dict[str, Tensor]:
    """input_ids, position_ids: [1, N], every different prompt and after it the completions of its samples, each without
    its last token, which predicts nothing (with `after` 1: with it, for the state after it).
    attention_mask: [1, 1, prompts, 1 + samples], their lengths
    (`modeling.shared_prefix`)."""
    groups: dict[tuple, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(tuple(sample.prompt["prompt_ids"]), []).append(i)
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[Tensor] = []
    sources: dict[int, Tensor] = {}
    for prompt, members in groups.items():
        last = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        lengths.append(torch.tensor([len(prompt), *(samples[i].length - 1 + after for i in members)]))
        for i in members:
            rest = samples[i].completion_ids[: samples[i].length - 1 + after]
            sources[i] = torch.tensor([last, *range(len(ids), len(ids) + len(rest))])
            ids += rest
            positions += range(len(prompt), len(prompt) + len(rest))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": pad_sequence(lengths, batch_first=True)[None, None],
        "completion_sources": pad_sequence([sources[i] for i in range(len(samples))], batch_first=True),
    }


def padding_share(batch: dict[str, Tensor]) -> Tensor:
    """The share of a batch's positions that hold no token. In either layout the attention mask sums to the tokens."""
    return 1 - batch["attention_mask"].sum() / batch["input_ids"].numel()


def split_by_length(samples: list[Sample], batches: int) -> list[list[Sample]]:
    """Sort by length and cut into `batches` of equal size (to within one), so that little is padded."""
    _check(len(samples), "samples", batches)
    ordered = sorted(samples, key=lambda sample: len(sample.prompt["prompt_ids"]) + sample.length)
    bounds = [round(i * len(ordered) / batches) for i in range(batches + 1)]
    return [ordered[bounds[i] : bounds[i + 1]] for i in range(batches)]


def balance(samples: list[Sample], batches: int, together: int) -> list[list[Sample]]:
    """`batches` of about equal tokens. Each run of `together` samples, those of one prompt, stays in one."""
    groups = [samples[i : i + together] for i in range(0, len(samples), together)]
    _check(len(groups), "prompts", batches)
    sizes = [len(group[0].prompt["prompt_ids"]) + sum(sample.length for sample in group) for group in groups]
    parts: list[list[Sample]] = [[] for _ in range(batches)]
    totals = [0] * batches
    for i in sorted(range(len(groups)), key=lambda i: -sizes[i]):
        lightest = min(range(batches), key=lambda b: totals[b])
        parts[lightest] += groups[i]
        totals[lightest] += sizes[i]
    return parts


def sequence_tokens(sample: Sample) -> int:
    return len(sample.prompt["prompt_ids"]) + sample.length


def pad_within(samples: list[Sample], budget: int) -> list[list[Sample]]:
    """Rows of similar length, each padded to the longest of its micro-batch: at most `budget` positions."""
    batches = length_batches([sequence_tokens(sample) for sample in samples], budget)
    return [[samples[i] for i in batch] for batch in batches]


def pack(samples: list[Sample], budget: int) -> list[list[Sample]]:
    """Micro-batches in which samples share the prompts that they have in common: at most `budget` tokens.

    As many samples of a prompt as fit go together; what is left of each prompt fills up what has room.
    """
    groups: dict[tuple, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample.prompt["prompt_ids"]), []).append(sample)
    pieces, sizes = [], []
    for prompt, members in groups.items():
        room = max(1, budget - len(prompt))
        for piece in packed_batches([sample.length for sample in members], room):
            pieces.append([members[i] for i in piece])
            sizes.append(len(prompt) + sum(members[i].length for i in piece))
    return [[sample for i in batch for sample in pieces[i]] for batch in packed_batches(sizes, budget)]


def _check(count: int, what: str, batches: int) -> None:
    if count < batches:
        raise RolloutError(f"{count} {what} cannot fill {batches} micro-batches: lower gradient_accumulation_steps")
