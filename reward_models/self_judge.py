"""The policy as the judge of its own completions, asked through the rollout engine that holds its weights."""

from typing import TYPE_CHECKING, Any, Protocol

from align.data.encode import render
from align.data.ending import written_text
from align.errors import RewardError
from align.reward_models.judge_server import question, read_template, read_verdict
from align.rollout.types import Rollout, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS_OF_CHAT = 64  # tokens that a chat template puts around the question, at most


class Generates(Protocol):
    """What is needed of a rollout engine."""

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Rollout]: ...


class SelfJudge:
    """A judge (`align.reward_models.judges.Judge`): the policy as it is now reads both answers and says which is
    better, greedily, so that a resumed run judges alike.

    As in self-rewarding language models (Yuan et al. 2024, arXiv 2401.10020), with verdicts on pairs in the place of
    points. Chat models get the question as a user's message, others as it is. A question longer than the engine's room
    and words without a readable verdict are None.

    Args:
        name: in errors. template: a file with {prompt}, {first} and {second}. max_tokens: of its words.
    """

    elsewhere = ("engine", "tokenizer", "room")  # of `align.modeling.fingerprint.mark`: they are the trainer's

    def __init__(self, name: str, *, template: str | None = None, max_tokens: int = 64):
        self.name, self.max_tokens = name, max_tokens
        self.template = read_template(template, f"reward {name!r}")
        self.engine: Generates | None = None
        self.tokenizer: Any = None
        self.room = 0

    def tokens(self, tokenizer: "PreTrainedTokenizerBase", *, prompt: int, completion: int) -> int:
        """How long a question and its answer may be, for prompts and completions of at most so many tokens. Texts may
        have a few more tokens where they stand together than alone: a 16th is added."""
        fixed = len(tokenizer(self.template, verbose=False)["input_ids"]) + WORDS_OF_CHAT * bool(
            tokenizer.chat_template
        )
        answers = prompt + 2 * completion
        return fixed + answers + answers // 16 + self.max_tokens

    def bind(self, engine: Generates, tokenizer: "PreTrainedTokenizerBase", room: int) -> None:
        """engine: holds the weights of the policy when it is asked. room: tokens of a question and its answer."""
        self.engine, self.tokenizer, self.room = engine, tokenizer, room

    def __call__(self, prompts: list, first: list[str], second: list[str]) -> list[float | None]:
        if self.engine is None:
            raise RewardError(f"reward {self.name!r}: there is no policy to ask: it judges in training on prompts only")
        ids = [self._encode(question(self.template, *pair)) for pair in zip(prompts, first, second, strict=True)]
        fits = [index for index, question_ids in enumerate(ids) if len(question_ids) + self.max_tokens <= self.room]
        verdicts: list[float | None] = [None] * len(ids)
        if not fits:
            return verdicts
        params = [SamplingParams(self.max_tokens, temperature=0.0)] * len(fits)
        for index, rollout in zip(fits, self.engine.generate([ids[i] for i in fits], params), strict=True):
            (said,) = rollout.completions
            text = written_text(self.tokenizer, said.token_ids, said.finish_reason == "stop")
            verdicts[index] = read_verdict(text)
        return verdicts

    def _encode(self, text: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.tokenizer(text, verbose=False)["input_ids"]
        messages = [{"role": "user", "content": text}]
        rendered = render(messages, self.tokenizer, {}, answer_next=True)
        return self.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
