"""A world in which a policy talks: a word-level tokenizer with a ChatML template, games, and short runs."""

import random
from collections.abc import Sequence

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.rollout.types import Completion, Rollout, SamplingParams
from tests.rollout.rollout_models import llama
from tests.trainers.tiny_runs import logged, on_policy

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


def length_of_answers(completions, **columns) -> list[float]:
    """Of all turns: differs between samples, so that no gradient is of rounding alone, which Adam would make a step."""
    return [sum(len(m["content"]) for m in talk if m["role"] == "assistant") / 100 for talk in completions]


def talking_run(folder, engine=None, *, tokenizer=None, reward=length_of_answers, **options) -> list[list]:
    """Three steps of ReMax on a random policy that plays `GuessingGame` and calls `double`, several turns in flight.
    What was logged: turns, the shares of answers that call and of games that end, losses, rewards, and gaps between the
    log-probs of engine and trainer. tokenizer: of `babbling_tokenizer`. options: of the configuration."""
    text = tokenizer or babbling_tokenizer()
    model = llama(3, vocab_size=96)
    model.generation_config.eos_token_id = list(range(3, 96, 4))  # answers of about four tokens
    options = {"max_steps": 3, "learning_rate": 5e-3, "seed": 6, "max_completion_length": 60, **options}
    trainer_class, args = on_policy("remax", folder, **options)
    world = {"environment_factory": GuessingGame, "tools": [double], "processing_class": text}
    trainer = trainer_class(model, reward, args, questions(64), engine=engine, **world)
    trainer.train()
    trainer.close()
    keys = ("environment/turns", "tools/call_frequency", "environment/finished_ratio", "loss", "reward")
    return [logged(trainer, key) for key in (*keys, "rollout/mean_abs_logp_diff")]


def babbling_tokenizer() -> PreTrainedTokenizerFast:
    """Of 96 words, half of which are whole tool calls, so that a random policy makes some."""
    calls = [f"<tool_call>{call}</tool_call>" for call in CALLS]
    return talking_tokenizer(
        more=[f"{calls[i % 3] if i % 2 else 'word'}{i}" for i in range(96 - len(talking_tokenizer()))]
    )


class Scripted:
    """An engine that gives the answers of a list, one for each call, and notes what it is asked."""

    tells = draws_elsewhere = False

    def __init__(self, tokenizer, *answers, finish="stop"):
        self.tokenizer, self.answers, self.finish = tokenizer, answers, finish
        self.asked: list[list[tuple[str, SamplingParams]]] = []

    def anyone(self, wants):
        return wants

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
