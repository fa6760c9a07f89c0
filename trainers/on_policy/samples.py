"""Prompts and samples: what the rows of the data become on their way from the engine to a loss."""

import logging
from dataclasses import dataclass, field

import numpy as np
import torch

from align.data.ending import written_text
from align.data.formats import check_tokens, columns_of
from align.data.limits import check_reads, lengths_of, longest_input
from align.data.streams import is_stream
from align.data.tokenize import tokenize_pairs, tokenize_prompts
from align.data.tokenized import IDS
from align.errors import DataError, RolloutError
from align.modeling.rotary import choose_factors
from align.objectives.kl import masked_sum
from align.rollout.types import Completion, Episode
from align.trainers.on_policy.environments import Environments, with_prompts

logger = logging.getLogger(__name__)


@dataclass
class Sample:
    """One completion of a prompt. What is None or empty at first is filled in on the way to the loss.

    engine_logps: log-probs under the engine, [L]. rewards: one score per reward that applies, by name. score: their
    weighted sum less `penalty`, what a long or cut completion loses (`TruncationRule`). left_out: of the loss and of
    baselines, for want of a score, or, if `masked`, for having been cut. bootstrap: values after the last token of
    a cut completion, [streams], that stand for its score; None where the score counts. shown: what a reward said beside
    it. drawn_by: version of the weights and number of tokens of each part, where it was drawn in parts. episode: of a
    completion of several turns, whose tokens of the environment are in no loss. ref_logps, old_logps:
    under the reference and under the policy before the first update, [L], nats. entropies: of its tokens then, until
    advantages are known. advantages, values, returns: [L, streams].
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
    penalty: float = 0.0
    left_out: bool = False
    masked: bool = False
    bootstrap: torch.Tensor | None = None
    shown: dict[str, str | float] = field(default_factory=dict)
    drawn_by: list[tuple[int, int]] | None = None
    episode: Episode | None = None
    ref_logps: torch.Tensor | None = None
    old_logps: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    @property
    def versions(self) -> list[int]:
        """Of the weights that drew each token."""
        parts = self.drawn_by or [(self.weight_version, self.length)]
        return [version for version, tokens in parts for _ in range(tokens)]

    @property
    def length(self) -> int:
        """Tokens after the prompt, those of an environment among them."""
        return len(self.completion_ids)

    @property
    def written(self) -> int:
        """Tokens that the policy wrote: what losses and metrics count."""
        return self.length if self.episode is None else sum(self.episode.policy_mask)


def fit_prompts(args, model) -> None:
    """Lowers `max_prompt_length` to what the model's positions leave beside a completion where it is the default.
    Raises ConfigError for more than these, and for budgets of tokens below what a completion may have then."""
    limit, positions, given = args.max_prompt_length, longest_input(model), args.max_completion_length
    left = limit if positions is None else positions - given
    if limit == type(args).max_prompt_length and 0 < left < limit:
        logger.warning(
            "max_prompt_length: %d of the %d positions, as max_completion_length is %d", left, positions, given
        )
        args.max_prompt_length = left
    choose_factors(model, args.max_prompt_length + given)
    check_reads(model, "policy", tokens=0, length=args.max_prompt_length + given)
    args.check_budgets()


def tokenized_prompts(
    dataset, tokenizer, args, tools: list[dict] | None = None, environments: Environments | None = None
):
    """Prompts as the loop takes them; a dataset that is tokenised already is taken as it is. tools: their schemas, for
    the chat template. environments: that the prompts are for."""
    if environments is not None:
        environments.check(dataset)
        dataset = with_prompts(dataset)
    if "prompt_ids" in columns_of(dataset, streams=True):
        check_tokens(dataset, ["prompt_ids"])
        check_lengths(dataset, args.max_prompt_length)
        return dataset
    return tokenize_prompts(
        dataset,
        tokenizer,
        max_prompt_length=args.max_prompt_length,
        max_bad_share=args.max_bad_share,
        num_proc=args.dataset_num_proc,
        template_options={**(args.chat_template_kwargs or {}), **({"tools": tools} if tools else {})} or None,
        streams=True,
        completed=environments is not None,
    )


def check_lengths(dataset, limit: int) -> None:
    """DataError for prompts of more than `limit` tokens, in a dataset that came tokenised; a stream is not read."""
    if is_stream(dataset):
        return
    found = np.flatnonzero(lengths_of(dataset, "prompt_ids") > limit)
    if not len(found):
        return
    raise DataError(
        f"{len(found)} tokenised prompts are longer than max_prompt_length={limit} (row {found[0]}"
        f"{' and others' * (len(found) > 1)}): leave them out, or raise it"
    )


def tokenized_pairs(dataset, tokenizer, args, tools: list[dict] | None = None, environments=None):
    """The same with an offline pair for each prompt, `chosen_ids` and `rejected_ids`; an answer is cut where those of
    the policy end at the latest. tools, environments: none, as the pairs have no turns of theirs."""
    if {*IDS} <= columns_of(dataset, streams=True):
        check_tokens(dataset, IDS)
        check_lengths(dataset, args.max_prompt_length)
        return dataset
    return tokenize_pairs(
        dataset,
        tokenizer,
        max_length=args.max_prompt_length + args.max_completion_length,
        max_prompt_length=args.max_prompt_length,
        max_bad_share=args.max_bad_share,
        num_proc=args.dataset_num_proc,
    )


def decode(tokenizer, prompt: dict, completion: Completion) -> str | list[dict]:
    """The completion in the form of its prompt: a string, or messages for conversational prompts: one of the assistant,
    or the turns of its episode."""
    if completion.episode is not None:
        return completion.episode.messages
    text = written_text(tokenizer, completion.token_ids, completion.finish_reason == "stop")
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
            prompt=prompt if completion.episode is None else completion.episode.prompt,
            completion_ids=completion.token_ids,
            completion=decode(tokenizer, prompt, completion),
            engine_logps=completion.logprobs or [],
            truncated=completion.finish_reason == "length",
            weight_version=weight_version,
            drawn_by=completion.drawn_by,
            episode=completion.episode,
        )
        for completion in completions
    ]


def completion_matrix(samples: list[Sample], name: str) -> torch.Tensor:
    """A per-token attribute of the samples as [N, L] (or [N, L, streams]) float32, left-aligned, 0 beyond the end."""
    columns = [torch.as_tensor(getattr(sample, name), dtype=torch.float32) for sample in samples]
    return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)


def completion_masks(samples: list[Sample]) -> torch.Tensor:
    """1 on the tokens that the policy wrote in each completion, [N, L], left-aligned; 0 on all of one that is left
    out."""
    lengths = torch.tensor([sample.length for sample in samples])
    kept = torch.tensor([not sample.left_out for sample in samples])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]) & kept[:, None]
    for i, sample in enumerate(samples):
        if sample.episode is not None:
            mask[i, : sample.length] &= torch.tensor(sample.episode.policy_mask, dtype=torch.bool)
    return mask.float()


def sampling_logps(samples: list[Sample]) -> torch.Tensor:
    """Log-probs of the policy that sampled, [N, L]: the trainer's where it has computed them, else the engine's."""
    return completion_matrix(samples, "old_logps" if samples[0].old_logps is not None else "engine_logps")


def sequence_kl(samples: list[Sample]) -> torch.Tensor:
    """log pi - log ref of each completion under the policy that sampled, k1 of its KL: [N], nats."""
    log_ratios = sampling_logps(samples) - completion_matrix(samples, "ref_logps")
    return masked_sum(log_ratios, completion_masks(samples))


def scatter(samples: list[Sample], name: str, values: torch.Tensor) -> None:
    """Give each sample its row of values [N, L, ...], as a tensor of its own: a view would keep, and save, them all."""
    for sample, row in zip(samples, values.detach().cpu(), strict=True):
        setattr(sample, name, row[: sample.length].clone())
