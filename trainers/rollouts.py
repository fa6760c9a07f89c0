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
    baseline: what the score is compared with (ReMax: the greedy completion's score).
    ref_logps: log-probs under the reference, [L], nats.
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
    ref_logps: torch.Tensor | None = None

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


def collate(samples: list[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Samples -> right-padded tensors.

    input_ids, attention_mask: [B, T] prompt and completion.
    completion_mask: [B, T-1], 1 where the token that follows is one of the completion: aligned with `token_logps`.
    ref_logps, engine_logps: [B, T-1], 0 outside the completion (absent when the samples have none).
    score, baseline: [B].
    """
    sequences = [sample.prompt["prompt_ids"] + sample.completion_ids for sample in samples]
    width = max(map(len, sequences))
    input_ids = torch.full((len(samples), width), pad_token_id)
    attention_mask = torch.zeros(len(samples), width, dtype=torch.long)
    per_token = {"completion_mask": torch.zeros(len(samples), width - 1)}
    if samples[0].ref_logps is not None:
        per_token["ref_logps"] = torch.zeros(len(samples), width - 1)
    if samples[0].engine_logps:
        per_token["engine_logps"] = torch.zeros(len(samples), width - 1)
    for i, (sample, ids) in enumerate(zip(samples, sequences, strict=True)):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        span = slice(len(ids) - sample.length - 1, len(ids) - 1)
        per_token["completion_mask"][i, span] = 1
        if "ref_logps" in per_token:
            per_token["ref_logps"][i, span] = sample.ref_logps
        if "engine_logps" in per_token:
            per_token["engine_logps"][i, span] = torch.tensor(sample.engine_logps)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        **per_token,
        "score": torch.tensor([sample.score for sample in samples]),
        "baseline": torch.tensor([sample.baseline for sample in samples]),
    }


def split(samples: list[Sample], batches: int) -> list[list[Sample]]:
    """Sort by length and cut into `batches` of equal size (to within one), so that little is padded."""
    if len(samples) < batches:
        raise RolloutError(
            f"{len(samples)} samples cannot fill {batches} micro-batches: lower gradient_accumulation_steps"
        )
    ordered = sorted(samples, key=lambda sample: len(sample.prompt["prompt_ids"]) + sample.length)
    bounds = [round(i * len(ordered) / batches) for i in range(batches + 1)]
    return [ordered[bounds[i] : bounds[i + 1]] for i in range(batches)]
