"""A world in which a policy talks: a word-level tokenizer with a ChatML template, games, and short runs."""

import random
from collections.abc import Sequence

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
