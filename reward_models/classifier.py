"""Rewards that are sequence classifiers with one output."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from align.data.bad_rows import BadRow
from align.data.collate import right_pad
from align.data.encode import check_tokenizer, close, encode, render_pair
from align.errors import DataError, RewardError
from align.modeling.load import load_sequence_classifier, load_tokenizer
from align.modeling.scores import sequence_scores
from reward_models.base import Reward, RewardBatch, RewardOutput
from reward_models.normalizer import Normalizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ClassifierReward(Reward):
    """`AutoModelForSequenceClassification` with one label, causal or encoder, read at the last real token.

    The score of a completion depends on nothing else in the batch: not on the padding side, on the order, or on a
    padding token that is also the end token. Completions are scored as text, through this model's own tokenizer and
    chat template, and end with EOS, as `RewardTrainer` trains them. Where the policy's tokenizer is known, a completion
    that was cut stays without EOS; where it is the same as this model's, the policy's token ids are scored as they are.

    Args:
        model: folder, hub name or loaded model. tokenizer: by default the model's own.
        policy_tokenizer: of the model whose `prompt_ids` and `completion_ids` come in.
        normalize: True requires the normaliser saved beside the model, False ignores it, None uses it if it is there.
        normalizer: one to use instead of the saved one.
        max_length: longer sequences lose the start of their prompt. Default: they are an error.
        batch_size: sequences per forward pass, of similar length.
        device, dtype: by default the GPU and the saved dtype where there is a GPU, else the CPU and float32.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        name: str | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        policy_tokenizer: "PreTrainedTokenizerBase | None" = None,
        normalize: bool | None = None,
        normalizer: Normalizer | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ):
        source = None if isinstance(model, nn.Module) else str(model)
        self.name = name or (Path(source).name if source else "reward")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = tokenizer or load_tokenizer(model)
        if source:
            dtype = dtype or ("auto" if self.device.type == "cuda" else "float32")
            model = load_sequence_classifier(
                source, dtype=dtype, pad_token_id=self.tokenizer.pad_token_id, fresh_head=False
            )
        self.model = model.to(self.device).eval()
        self.normalizer = self._choose_normalizer(source, normalize, normalizer)
        # models without learnt positions may name no limit
        self.longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.batch_size = batch_size
        self.max_length = max_length
        self.policy_tokenizer = policy_tokenizer
        self.shares_ids = policy_tokenizer is not None and same_tokenizer(self.tokenizer, policy_tokenizer)

    @property
    def normalized(self) -> bool:
        return self.normalizer is not None

    def score_ids(self, sequences: list[list[int]]) -> Tensor:
        """Normalised scores [B], float32 on the CPU, of whole sequences (prompt and completion) of this tokenizer."""
        scores = torch.empty(len(sequences), dtype=torch.float64)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                ids, mask = right_pad([sequences[i] for i in rows], self.tokenizer.pad_token_id)
                with torch.no_grad():
                    scores[rows] = sequence_scores(self.model, ids.to(self.device), mask.to(self.device)).double().cpu()
        finally:
            self.model.train(training)
        return (self.normalizer(scores) if self.normalizer else scores).float()

    def _score(self, batch: RewardBatch) -> RewardOutput:
        return RewardOutput(self.score_ids(self.sequences(batch)))

    # ---- from completions to token ids ------------------------------------------------------------------------------

    def sequences(self, batch: RewardBatch) -> list[list[int]]:
        """The token ids that are scored, prompt and completion, one list per completion."""
        if self.shares_ids and batch.prompt_ids is not None and batch.completion_ids is not None:
            pairs = list(zip(batch.prompt_ids, batch.completion_ids, strict=True))
        else:
            pairs = self._encode(batch)
        return [self._fit(row, list(prompt), list(completion)) for row, (prompt, completion) in enumerate(pairs)]

    def _encode(self, batch: RewardBatch) -> list[tuple[list[int], list[int]]]:
        conversational = len(batch) > 0 and not isinstance(batch.prompts[0], str)
        try:
            check_tokenizer(self.tokenizer, conversational, needs_eos=True)
        except DataError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error
        texts = []
        for row, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
            try:
                texts.append(
                    render_pair(prompt, [completion], self.tokenizer, {}) if conversational else (prompt, [completion])
                )
            except BadRow as reason:
                raise RewardError(f"reward {self.name!r}, row {row} of the batch: {reason}") from reason
        encoded = encode(self.tokenizer, texts, add_bos=not conversational)
        ended = self._ended(batch)
        return [(e.prompt_ids, self._end(e.completions[0], end)) for e, end in zip(encoded, ended, strict=True)]

    def _ended(self, batch: RewardBatch) -> list[bool]:
        if self.policy_tokenizer is None or batch.completion_ids is None:
            return [True] * len(batch)
        return [ids[-1:] == [self.policy_tokenizer.eos_token_id] for ids in map(list, batch.completion_ids)]

    def _end(self, ids: list[int], ended: bool) -> list[int]:
        closed = close(ids, self.tokenizer)
        return closed if ended else closed[:-1]

    def _fit(self, row: int, prompt: list[int], completion: list[int]) -> list[int]:
        where = f"reward {self.name!r}, row {row} of the batch"
        if not prompt and not completion:
            raise RewardError(f"{where}: prompt and completion are empty")
        limit, length = self.max_length or self.longest, len(prompt) + len(completion)
        if limit is None or length <= limit:
            return prompt + completion
        if self.max_length is None:
            raise RewardError(
                f"{where}: {length} tokens, and the model takes {limit}. Generate shorter, or set max_length: {limit} "
                "to cut the start of long prompts."
            )
        if len(completion) > limit:
            raise RewardError(f"{where}: the completion alone has {len(completion)} tokens, max_length is {limit}")
        return prompt[length - limit :] + completion

    def _choose_normalizer(self, source: str | None, normalize: bool | None, given: Normalizer | None):
        saved = given or (Normalizer.load(source) if source else None)
        if normalize and saved is None:
            raise RewardError(
                f"reward {self.name!r}: normalize is true and {source or 'the model'} has no normaliser beside it; "
                "RewardTrainer saves one, or fit one with Normalizer.fit"
            )
        return None if normalize is False else saved


def same_tokenizer(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase") -> bool:
    """Whether token ids and rendered prompts of one mean the same to the other."""
    return a is b or (
        a.get_vocab() == b.get_vocab() and a.eos_token_id == b.eos_token_id and a.chat_template == b.chat_template
    )
