"""From completions to the token ids that a reward model reads."""

import logging
from typing import TYPE_CHECKING

from align.data.bad_rows import BadRow
from align.data.checks import template_kwargs
from align.data.encode import check_tokenizer, encode, render_pair
from align.data.ending import Ending, close, end_ids, ending_of
from align.errors import ConfigError, DataError, RewardError
from align.reward_models.base import RewardBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Pair = tuple[list[int], list[int]]
OF_TEMPLATE = ("tools", "chat_template_kwargs")  # columns that the chat template is given, as in the training on pairs


class SequenceEncoder:
    """Prompt and completion as the token ids of one model, the completion closed by one end token (`data.ending`).

    Texts go through this model's own tokenizer and chat template, as the trainers encode them. Where the policy's
    tokenizer is known, a completion that was cut stays without end token; where it is the same as this model's, the
    policy's ids are taken, up to the end token, which is this model's: the same text is the same ids either way.

    whole_turn: an answer that ended is followed by what the template writes after it (mostly a line break), which is
    where models are read that were trained on `apply_chat_template`'s output.
    name: of the reward, for errors. vocabulary: number of the model's embeddings. longest: tokens that the model takes,
    None for no limit. max_length: longer sequences lose the start of their prompt; None: they are an error.
    """

    elsewhere = ("longest",)  # of `align.modeling.fingerprint.mark`: a server says it, and scores do not depend on it

    def __init__(
        self,
        name: str,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        policy_tokenizer: "PreTrainedTokenizerBase | None" = None,
        vocabulary: int | None = None,
        longest: int | None = None,
        max_length: int | None = None,
        whole_turn: bool = False,
    ):
        self.whole_turn = whole_turn
        self.name, self.tokenizer, self.policy_tokenizer = name, tokenizer, policy_tokenizer
        self.vocabulary, self.longest, self.max_length = vocabulary, longest, max_length
        self.shares_ids = policy_tokenizer is not None and same_tokenizer(tokenizer, policy_tokenizer)

    def __call__(self, batch: RewardBatch) -> list[Pair]:
        """(prompt_ids, completion_ids) of each completion. Raises `RewardError` naming the row."""
        conversational = len(batch) > 0 and not isinstance(batch.prompts[0], str)
        ending = ending_of(self.tokenizer, conversational)
        if self.shares_ids and batch.prompt_ids is not None and batch.completion_ids is not None:
            ended = self._ended(batch)
            known = batch.ended is not None  # then the last token is one that ended it, whichever that is
            written = [
                list(ids)[: -1 if known and end and ids[-1] != ending.call else None]
                for ids, end in zip(batch.completion_ids, ended, strict=True)
            ]
            completions = [self._end(ids, end, ending) for ids, end in zip(written, ended, strict=True)]
            pairs = list(zip(batch.prompt_ids, completions, strict=True))
        else:
            pairs = self._encode(batch, conversational, ending)
        fitted = []
        for row, (prompt, completion) in enumerate(pairs):
            try:
                fitted.append(self._fit(list(prompt), list(completion)))
            except BadRow as reason:
                raise RewardError(f"reward {self.name!r}, {batch.row_name(row)}: {reason}") from reason
        return fitted

    def check_room(self, prompt: int, completion: int, *, conversational: bool) -> None:
        """Raises `ConfigError` where what `__call__` refuses is to be expected; only warns where the tokens are counted
        by another tokenizer than this one. prompt: tokens of the longest. completion: of what may be drawn."""
        limit = self.max_length or self.longest
        after = len(ending_of(self.tokenizer, conversational).tail) if self.whole_turn else 0
        needed = completion + after + (0 if self.max_length else prompt)
        if limit is None or needed <= limit:
            return
        if self.max_length:
            what = f"max_length is {limit}, and a completion alone may have {needed} tokens: lower "
            what += "max_completion_length, or raise it"
        else:
            what = f"the longest prompt ({prompt} tokens) and a completion may have {needed} tokens together, and the "
            what += f"model takes {limit}: lower max_completion_length, or set max_length: {limit} to cut the start of "
            what += "long prompts"
        if self.shares_ids:
            raise ConfigError(f"reward {self.name!r}: {what}", key="rewards")
        logger.warning("reward %r: by the policy's tokenizer, which is not this reward's, %s", self.name, what)

    def _encode(self, batch: RewardBatch, conversational: bool, ending: Ending) -> list[Pair]:
        try:
            check_tokenizer(self.tokenizer, conversational, needs_eos=True)
        except DataError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error
        texts = []
        for row, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
            try:
                if conversational:
                    given = {name: batch.columns[name][row] for name in OF_TEMPLATE if name in batch.columns}
                    options = template_kwargs(given, tools=True)
                    start, (whole,) = render_pair(prompt, [completion], self.tokenizer, options, drawn=True)
                    texts.append((start, whole))
                else:
                    texts.append((prompt, prompt + completion))
            except BadRow as reason:
                raise RewardError(f"reward {self.name!r}, {batch.row_name(row)}: {reason}") from reason
        rows_of: dict[str, list[int]] = {}  # a prompt that has several completions is tokenised once
        for row, (start, _) in enumerate(texts):
            rows_of.setdefault(start, []).append(row)
        groups = [(start, [texts[row][1] for row in rows]) for start, rows in rows_of.items()]
        encoded = encode(self.tokenizer, groups, add_bos=not conversational)
        ended = self._ended(batch)
        pairs: list[Pair] = [([], [])] * len(batch)
        for rows, (prompt_ids, completions, _) in zip(rows_of.values(), encoded, strict=True):
            for row, ids in zip(rows, completions, strict=True):
                pairs[row] = prompt_ids, self._end(ids, ended[row], ending)
        return pairs

    def _ended(self, batch: RewardBatch) -> list[bool]:
        if batch.ended is not None:
            return batch.ended
        if self.policy_tokenizer is None or batch.completion_ids is None:
            return [True] * len(batch)
        ends = end_ids(self.policy_tokenizer)
        return [bool(ids) and ids[-1] in ends for ids in map(list, batch.completion_ids)]

    def _end(self, ids: list[int], ended: bool, ending: Ending) -> list[int]:
        closed = close(ids, ending, self.tokenizer)
        if not ended:
            return closed[:-1]
        return [*closed, *ending.tail] if self.whole_turn and closed[-1] == ending.token else closed

    def _fit(self, prompt: list[int], completion: list[int]) -> Pair:
        if not prompt and not completion:
            raise BadRow("prompt and completion are empty")
        highest = max(max(prompt, default=0), max(completion, default=0))
        if self.vocabulary is not None and highest >= self.vocabulary:
            raise BadRow(
                f"token {highest}, and the model knows {self.vocabulary} tokens: the tokenizer is not this model's"
            )
        limit, length = self.max_length or self.longest, len(prompt) + len(completion)
        if limit is None or length <= limit:
            return prompt, completion
        if self.max_length is None:
            raise BadRow(
                f"{length} tokens, and the model takes {limit}. Generate shorter, or set max_length: {limit} to cut "
                "the start of long prompts."
            )
        if len(completion) > limit:
            raise BadRow(f"the completion alone has {len(completion)} tokens, max_length is {limit}")
        return prompt[length - limit :], completion


def same_tokenizer(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase") -> bool:
    """Whether token ids and rendered prompts of one mean the same to the other."""
    return a is b or (
        a.get_vocab() == b.get_vocab() and a.eos_token_id == b.eos_token_id and a.chat_template == b.chat_template
    )
