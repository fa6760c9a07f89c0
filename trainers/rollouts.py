"""Prompts and samples: what the rows of the data become on their way through the engine to a loss."""

from dataclasses import dataclass, field

import torch

from align.data.tokenize import tokenize_prompts
from align.errors import RolloutError
from align.rollout.types import Completion


@dataclass
class Sample:
    """One sampled completion of a training prompt. The trainer fills it in as it goes through the loop.

    engine_logps: log-probs under the engine, [L]. rewards: one score per reward, by name. score: their weighted sum.
    baseline: what the score is compared with (ReMax: the greedy completion's score); baselines: the same of every
    stream of the weighting. ref_logps, old_logps: under the reference and under the policy before the first update,
    [L], nats. advantages, values, returns: [L, streams].
    """

    prompt: dict
    completion_ids: list[int]
    completion: str | list[dict]
    engine_logps: list[float]
    truncated: bool
    weight_version: int
    rewards: dict[str, float] = field(default_factory=dict)
    extras: dict[str, float] = field(default_factory=dict)
    score: float = 0.0
    baseline: float = 0.0
    baselines: dict[str, float] = field(default_factory=dict)
    ref_logps: torch.Tensor | None = None
    old_logps: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return len(self.completion_ids)


def tokenized_prompts(dataset, tokenizer, args):
    """Prompts as the loop takes them; a dataset that is tokenised already is taken as it is."""
    if "prompt_ids" in dataset.column_names:
        return dataset
    return tokenize_prompts(
        dataset, tokenizer, max_prompt_length=args.max_prompt_length, max_bad_share=args.max_bad_share
    )


def decode(tokenizer, prompt: dict, completion: Completion) -> str | list[dict]:
    """The completion in the form of its prompt: a string, or one assistant message for conversational prompts."""
    text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    return [{"role": "assistant", "content": text}] if isinstance(prompt["prompt"], list) else text


def as_text(value: str | list[dict]) -> str:
    """A prompt or completion as one readable text, conversational or not."""
    return value if isinstance(value, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in value)


def make_samples(tokenizer, prompt: dict, completions: list[Completion], weight_version: int) -> list[Sample]:
    """The samples of one prompt. Raises `RolloutError` naming the row when a completion has no token at all."""
    for completion in completions:
        if not completion.token_ids:
            raise RolloutError(f"the engine returned an empty completion for the prompt of row {prompt['row']}")
    return [
        Sample(
            prompt=prompt,
            completion_ids=completion.token_ids,
            completion=decode(tokenizer, prompt, completion),
            engine_logps=completion.logprobs or [],
            truncated=completion.finish_reason == "length",
            weight_version=weight_version,
        )
        for completion in completions
    ]


PER_TOKEN = ("engine_logps", "ref_logps", "old_logps", "advantages", "values", "returns")


def collate(samples: list[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Samples -> right-padded tensors.

    input_ids, attention_mask: [B, T] prompt and completion.
    completion_mask: [B, T-1], 1 where the token that follows is one of the completion: aligned with `token_logps`.
    Those of `PER_TOKEN` that the samples have: [B, T-1] (or [B, T-1, streams]), 0 outside the completion.
    """
    sequences = [sample.prompt["prompt_ids"] + sample.completion_ids for sample in samples]
    width = max(map(len, sequences))
    input_ids = torch.full((len(samples), width), pad_token_id)
    attention_mask = torch.zeros(len(samples), width, dtype=torch.long)
    completion_mask = torch.zeros(len(samples), width - 1)
    spans = [slice(len(ids) - sample.length - 1, len(ids) - 1) for sample, ids in zip(samples, sequences, strict=True)]
    for i, ids in enumerate(sequences):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        completion_mask[i, spans[i]] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}
    for name in PER_TOKEN:
        columns = [getattr(sample, name) for sample in samples]
        if columns[0] is None or len(columns[0]) == 0:
            continue
        columns = [torch.as_tensor(column, dtype=torch.float32) for column in columns]
        batch[name] = torch.zeros(len(samples), width - 1, *columns[0].shape[1:])
        for i, column in enumerate(columns):
            batch[name][i, spans[i]] = column
    return batch


def completion_matrix(samples: list[Sample], name: str) -> torch.Tensor:
    """A per-token attribute of the samples as [N, L] (or [N, L, streams]) float32, left-aligned, 0 beyond the end."""
    columns = [torch.as_tensor(getattr(sample, name), dtype=torch.float32) for sample in samples]
    return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)


def completion_masks(samples: list[Sample]) -> torch.Tensor:
    """1 on the tokens of each completion, [N, L], left-aligned."""
    lengths = torch.tensor([sample.length for sample in samples])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).float()


def split(samples: list[Sample], batches: int) -> list[list[Sample]]:
    """Sort by length and cut into `batches` of equal size (to within one), so that little is padded."""
    if len(samples) < batches:
        raise RolloutError(
            f"{len(samples)} samples cannot fill {batches} micro-batches: lower gradient_accumulation_steps"
        )
    ordered = sorted(samples, key=lambda sample: len(sample.prompt["prompt_ids"]) + sample.length)
    bounds = [round(i * len(ordered) / batches) for i in range(batches + 1)]
    return [ordered[bounds[i] : bounds[i + 1]] for i in range(batches)]
