"""A world in which a policy talks: a word-level tokenizer with a ChatML template, games, and short runs."""

import random
from collections.abc import Sequence

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.rollout.types import Completion, Rollout, SamplingParams

NUMBERS = ["one", "two", "three"]
CHATML = (
    "{% if tools %}<|im_start|> system {% for tool in tools %}{{ tool.function.name }} {% endfor %}"
    "<tool_call> <|im_end|> {% endif %}"
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
CALLS = [f'{{"name":"double","arguments":{{"number":"{word}"}}}}' for word in NUMBERS]
WORDS = ["user", "assistant", "tool", "system", "guess", "higher", "lower", "double", "<tool_call>", "</tool_call>"]


def talking_tokenizer(template: str = CHATML, more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *WORDS, *NUMBERS, *CALLS, *more]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
        model_input_names=["input_ids", "attention_mask"],
    )


def double(number: str) -> str:
    """Twice a number.

    Args:
        number: its name.
    """
    return {"one": "two"}[number]


class GuessingGame:
    """The policy finds one of three numbers: after a wrong guess it is told where to look, and guesses once more. Who
    does not listen to it gets 2/3 of the points at most."""

    def reset(self, row):
        self.secret, self.guesses = random.Random(row["environment_seed"]).randrange(3), 0

    def step(self, answer):
        self.guesses += 1
        guess = NUMBERS.index(answer) if answer in NUMBERS else None
        if guess == self.secret or self.guesses == 2:
            return None, float(guess == self.secret), True
        return "guess" if guess is None else "higher" if guess < self.secret else "lower", 0.0, False


def questions(count: int, word: str = "guess") -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": word}]}] * count)


class Scripted:
    """An engine that gives the answers of a list, one for each call, and notes what it is asked."""

    def __init__(self, tokenizer, *answers, finish="stop"):
        self.tokenizer, self.answers, self.finish = tokenizer, answers, finish
        self.asked: list[list[tuple[str, SamplingParams]]] = []

    def generate(self, prompts, params):
        self.asked.append([(self.tokenizer.decode(ids), own) for ids, own in zip(prompts, params, strict=True)])
        text = self.answers[len(self.asked) - 1]
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return [Rollout(p, [Completion(ids[: own.max_tokens], [-1.0] * len(ids[: own.max_tokens]), self.finish)], 7)
                for p, own in zip(prompts, params, strict=True)]  # fmt: skip


def rows(tokenizer, count=1, **columns):
    messages = [{"role": "user", "content": "guess"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return [{"prompt": messages, "prompt_ids": ids, "row": i, **columns} for i in range(count)]


class Sums:
    """TRL's kind of environment: its methods are tools, and it scores itself."""

    def reset(self, **row):
        self.called, self.asked = 0, row["row"]

    def double(self, number: str) -> str:
        """Twice a number.

        Args:
            number: its name.
        """
        self.called += 1
        return double(number)

    def get_reward(self):
        return float(self.called)
