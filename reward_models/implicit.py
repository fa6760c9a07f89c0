"""Rewards that two language models imply: what a policy was trained to prefer over its reference."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from align.data.collate import right_pad
from align.errors import ConfigError, RewardError
from align.modeling.adapters import adapter_start, is_adapter
from align.modeling.load import Reference, load_adapted, load_policy, load_tokenizer, reference_of
from align.modeling.logprobs import token_logps
from align.modeling.types import Model
from align.reward_models.base import RewardBatch, RewardOutput
from align.reward_models.by_model import ModelReward
from align.reward_models.classifier import scoring_device, scoring_tokens
from align.reward_models.offload import HOST
from align.reward_models.sequences import Pair, SequenceEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class ImplicitReward(ModelReward):
    """beta * (log pi(y|x) - log pi_ref(y|x)), summed over the completion's tokens, its EOS included.

    The reward that a DPO policy fits, up to a term of the prompt alone (Rafailov et al. 2023, eq. 5), so scores of
    different prompts are on no common scale. MODPO's margins are such rewards (Zhou et al. 2023). The score of a
    completion depends on nothing else in the batch.

    `model_folders`: of policy and reference, or their hub names; None for one that came loaded.

    Args:
        model: the policy: a folder, hub name or loaded causal model. A folder with a LoRA adapter, or a loaded PEFT
            model, needs no reference: it is its own base, with the adapter switched off.
        reference: folder, hub name or loaded model. beta: that of the training; only scales the score.
        tokenizer: by default the model's own. policy_tokenizer: of the model whose token ids come in.
        max_length: longer sequences lose the start of their prompt. Default: they are an error.
        batch_tokens: padded tokens per forward pass, of sequences of similar length.
        device, dtype: by default the GPU and the saved dtype where there is a GPU, else the CPU and float32.
        offload: whether the models are on the GPU only while they score. ranks: as of `ClassifierReward`.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        reference: str | Path | Model | None = None,
        beta: float = 0.1,
        name: str | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        policy_tokenizer: "PreTrainedTokenizerBase | None" = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        offload: bool = False,
        ranks: Sequence[int] | None = None,
    ):
        source = None if isinstance(model, nn.Module) else str(model)
        self.name = name or (Path(source).name if source else "implicit")
        if not (math.isfinite(beta) and beta > 0):
            raise ConfigError(f"reward {self.name!r}: beta must be > 0, got {beta}")
        self.beta = beta
        self.device, dtype = scoring_device(device, dtype)
        self.tokenizer = tokenizer or load_tokenizer(model)
        self.offloaded = offload
        place = HOST if offload else self.device

        def load() -> list[Model]:
            policy = _load(model, dtype, keep_adapter=reference is None).to(place).eval()
            if reference is None and not _has_adapter(policy):
                raise ConfigError(
                    f"reward {self.name!r}: {source or type(policy).__name__} has no adapter to switch off, so name "
                    "the reference that it was trained against"
                )
            base = None if reference is None else _load(reference, dtype, keep_adapter=False).to(place)
            found = reference_of(policy, base)
            return [policy] if found.adapter_off else [policy, found.model]

        base = reference
        if reference is not None:
            _check_same_vocabulary(self.name, self.tokenizer, reference)
        given = isinstance(model, nn.Module) or isinstance(reference, nn.Module)
        (self.model, *other), known = self._load(load, ranks, given)
        self.reference = Reference(other[0] if other else self.model, adapter_off=not other)
        if reference is None:
            base = adapter_start(source) if source else self.model.peft_config["default"].base_model_name_or_path
        self.model_folders = (source, None if isinstance(base, nn.Module) else str(base))
        self.batch_tokens = scoring_tokens(self.device, batch_tokens)
        self.encoder = SequenceEncoder(
            self.name,
            self.tokenizer,
            policy_tokenizer=policy_tokenizer,
            vocabulary=known.tokens,
            longest=known.longest,
            max_length=max_length,
        )

    def models(self) -> list[nn.Module]:
        models: list[nn.Module] = [self.model] if self.reference.adapter_off else [self.model, self.reference.model]
        return models if self.here else []

    def score_ids(self, pairs: list[Pair]) -> Tensor:
        """Scores [B], float32 on the CPU, of (prompt_ids, completion_ids) of this model's tokenizer."""
        return self.output(self.numbers(pairs)).scores

    def inputs(self, batch: RewardBatch) -> list[Pair]:
        pairs = self.encoder(batch)
        for row, (prompt, completion) in enumerate(pairs):
            if not prompt or not completion:
                what = "prompt" if not prompt else "completion"
                raise RewardError(
                    f"reward {self.name!r}, {batch.row_name(row)}: the {what} is empty, so there is no log-prob of the "
                    "completion given the prompt"
                )
        return pairs

    def tokens(self, one: list | tuple) -> int:
        prompt, completion = one
        return len(prompt) + len(completion)

    def forward(self, inputs: list[Pair]) -> Tensor:
        """Log-ratios [b], float64."""
        ids, attention = right_pad(
            [[*prompt, *completion] for prompt, completion in inputs], self.tokenizer.pad_token_id
        )
        starts = torch.tensor([len(prompt) for prompt, _ in inputs])[:, None]
        completion = attention * (torch.arange(ids.shape[1]) >= starts)
        ids, attention, completion = (x.to(self.device) for x in (ids, attention, completion))
        logps = token_logps(self.model, ids, attention, mask=completion)
        ref_logps = self.reference.logps(ids, attention, mask=completion)
        return (logps.double() - ref_logps.double()).sum(-1)

    def output(self, numbers: Tensor) -> RewardOutput:
        return RewardOutput((self.beta * numbers).float())


def _load(model: str | Path | Model, dtype, *, keep_adapter: bool) -> Model:
    """A causal model; with `keep_adapter` the adapter of a folder is not merged, so that it can be switched off."""
    if isinstance(model, nn.Module):
        return model
    if not (keep_adapter and is_adapter(model)):
        return load_policy(model, dtype=dtype)
    logger.info("%s is an adapter, and what it was trained on (%s) is its reference", model, adapter_start(model))
    return load_adapted(model, dtype=dtype)


def _has_adapter(model: Model) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _check_same_vocabulary(name: str, tokenizer, reference: str | Path | Model) -> None:
    """The two models must read the same ids as the same tokens."""
    if isinstance(reference, nn.Module):
        return
    other = load_tokenizer(reference)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"reward {name!r}: the reference {reference} has another vocabulary than the model, so their log-probs are "
            "of different tokens. Name the model that training started from"
        )
