"""Rewards that are sequence classifiers with one output."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from align.data.collate import right_pad
from align.errors import ConfigError
from align.modeling.load import load_sequence_classifier, load_tokenizer
from align.modeling.padding import take_batches
from align.modeling.scores import sequence_scores
from align.modeling.types import Model
from align.reward_models.base import RewardBatch, RewardOutput
from align.reward_models.by_model import ModelReward
from align.reward_models.normalizer import Normalizer, choose_normalizer
from align.reward_models.offload import HOST
from align.reward_models.sequences import SequenceEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ClassifierReward(ModelReward):
    """`AutoModelForSequenceClassification` with one label, causal or encoder, read at the last real token.

    The score of a completion depends on nothing else in the batch: not on the padding side, on the order, or on a
    padding token that is also the end token. Completions are scored as text, through this model's own tokenizer and
    chat template, and read at their end token (`align.data.ending`), as `RewardTrainer` trains them. A model that
    `RewardTrainer` has not marked as its own is read where the whole template ends, as `apply_chat_template` gives it.
    Where the policy's tokenizer is known, a completion that was cut stays without end token; where it is the same as
    this model's, the policy's token ids are scored.

    Args:
        model: folder, hub name, loaded model, or a function that loads it, beside which `tokenizer` has to be given.
        tokenizer: by default the model's own.
        policy_tokenizer: of the model whose `prompt_ids` and `completion_ids` come in.
        normalize: True requires the normaliser saved beside the model, False ignores it, None uses it if it is there.
        normalizer: one to use instead of the saved one.
        max_length: longer sequences lose the start of their prompt. Default: they are an error.
        batch_tokens: padded tokens per forward pass, of sequences of similar length. batch_size: at most so many
            sequences.
        device, dtype: by default the GPU and the saved dtype where there is a GPU, else the CPU and float32.
        offload: whether the model is on the GPU only while it scores.
        ranks: of the run, which alone load the model and score what all ranks have; then all ranks make the reward,
            and score with it, together. Default: every process loads it.
    """

    def __init__(
        self,
        model: str | Path | Model | Callable[[], Model],
        *,
        name: str | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        policy_tokenizer: "PreTrainedTokenizerBase | None" = None,
        normalize: bool | None = None,
        normalizer: Normalizer | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        offload: bool = False,
        ranks: Sequence[int] | None = None,
    ):
        source = str(model) if isinstance(model, str | Path) else None
        self.name = name or (Path(source).name if source else "reward")
        self.device, dtype = scoring_device(device, dtype)
        self.tokenizer = tokenizer or load_tokenizer(cast("Model", model))
        self.offloaded = offload

        def load() -> list[Model]:
            loaded: Any = model
            if source is not None:
                padding = self.tokenizer.pad_token_id
                loaded = load_sequence_classifier(source, dtype=dtype, pad_token_id=padding, fresh_head=False)
            elif not isinstance(model, nn.Module):
                loaded = cast("Callable[[], Model]", model)()
            return [take_batches(loaded.to(HOST if offload else self.device).eval(), self.tokenizer)]

        (self.model,), known = self._load(load, ranks, given=isinstance(model, nn.Module))
        self.normalizer = choose_normalizer(self.name, source, normalize, normalizer)
        self.batch_tokens, self.batch_size = scoring_tokens(self.device, batch_tokens), batch_size
        self.encoder = SequenceEncoder(
            self.name,
            self.tokenizer,
            policy_tokenizer=policy_tokenizer,
            vocabulary=known.tokens,
            longest=known.longest,
            max_length=max_length,
            whole_turn=not known.at_end_token,
        )

    @property
    def normalized(self) -> bool:
        return self.normalizer is not None

    def score_ids(self, sequences: list[list[int]]) -> Tensor:
        """Normalised scores [B], float32 on the CPU, of whole sequences (prompt and completion) of this tokenizer."""
        return self._normalised(self.numbers(sequences))

    def inputs(self, batch: RewardBatch) -> list[list[int]]:
        """The token ids that are scored, prompt and completion, one list per completion."""
        return [prompt + completion for prompt, completion in self.encoder(batch)]

    def tokens(self, one: list | tuple) -> int:
        return len(one)

    def forward(self, inputs: list[list[int]]) -> Tensor:
        ids, mask = right_pad(inputs, self.tokenizer.pad_token_id)
        return sequence_scores(self.model, ids.to(self.device), mask.to(self.device))

    def output(self, numbers: Tensor) -> RewardOutput:
        return RewardOutput(self._normalised(numbers))

    def _normalised(self, scores: Tensor) -> Tensor:
        return (self.normalizer(scores) if self.normalizer else scores).float()

    @property
    def shares_ids(self) -> bool:
        """Whether the policy's token ids are scored as they are."""
        return self.encoder.shares_ids


def scoring_device(device: str | torch.device | None, dtype: str | torch.dtype | None) -> tuple[torch.device, Any]:
    """(device, dtype of weights that are loaded): the GPU and the saved dtype where there is a GPU, else float32."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, dtype or ("auto" if device.type == "cuda" else "float32")


def scoring_tokens(device: torch.device, batch_tokens: int | None) -> int:
    """Padded tokens of one forward pass without gradients, unless given: enough to keep a GPU busy; on a CPU few enough
    that activations stay in its caches (benchmarks/score_throughput.py)."""
    if batch_tokens is not None and batch_tokens < 1:
        raise ConfigError(f"batch_tokens must be at least 1, got {batch_tokens}")
    return batch_tokens or (32768 if device.type == "cuda" else 1024)
