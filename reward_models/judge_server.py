"""A language model behind an OpenAI-compatible endpoint as the judge of pairs, and the words in which one is asked."""

import re
from pathlib import Path
from typing import Any, Unpack

from align.errors import ConfigError, RewardError
from align.reward_models.remote import Asking, JsonServer, check_whole

VERDICT = re.compile(r"\[\[(A|B|C)\]\]")
MEANING = {"A": 1.0, "B": 0.0, "C": 0.5}
FIELDS = ("{prompt}", "{first}", "{second}")
# After the pair prompt of MT-Bench (Zheng et al. 2023, arXiv 2306.05685, figure 5), whose verdicts these are.
QUESTION = """Two assistants have answered the same request. Decide which answer is better: more correct, more \
helpful, closer to what was asked. Neither the order of the answers nor their length matters.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

[End of the answers]
End with your verdict and nothing after it: [[A]] if answer A is better, [[B]] if answer B is, [[C]] for a tie."""


def question(template: str, prompt: Any, first: str, second: str) -> str:
    """The text that a judge is asked with. prompt: text or messages. Braces inside of prompts and answers stay."""
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    values = dict(zip(FIELDS, (prompt, first, second), strict=True))
    return re.sub("|".join(map(re.escape, FIELDS)), lambda found: values[found[0]], template)


def read_verdict(text: str) -> float | None:
    """1, 0 or 0.5 of the last [[A]], [[B]] or [[C]]; None where there is none."""
    found = VERDICT.findall(text)
    return MEANING[found[-1]] if found else None


def read_template(path: str | None, what: str) -> str:
    """The question in a file, or the one above. ConfigError where it lacks one of its three fields."""
    if path is None:
        return QUESTION
    if not Path(path).is_file():
        raise ConfigError(f"{what}: template {path} does not exist")
    text = Path(path).read_text(encoding="utf-8")
    lacking = [name for name in FIELDS if name not in text]
    if lacking:
        raise ConfigError(f"{what}: template {path} lacks {', '.join(lacking)}, which the pair is put into")
    return text


class ServerJudge(JsonServer):
    """A judge (`align.reward_models.judges.Judge`) that asks a chat endpoint about each pair, greedily.

    What has no readable verdict is None. Two answers that hold "[[A]]" do no harm: the last verdict of the judge's own
    words counts; an answer that talks the judge into a verdict does.

    Args:
        url: of the endpoint, http://localhost:8000/v1/chat/completions say. model: the name it is served under.
        template: a file with {prompt}, {first} and {second}. max_tokens: of the judge's words.
        request: further keys of every request (`{reasoning_effort: low}` say).
        headers, concurrency (16), timeout (120), retries, backoff: of `JsonServer`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        name: str = "judge",
        template: str | None = None,
        max_tokens: int = 512,
        request: dict[str, Any] | None = None,
        **of_server: Unpack[Asking],
    ):
        # a judge writes before it answers: it wants more time, and more requests at once
        options: Asking = {"concurrency": 16, "timeout": 120.0, **of_server}
        super().__init__(url, f"judge {name!r}", **options)
        check_whole(f"judge {name!r}", max_tokens=(max_tokens, 1))
        self.name, self.model, self.max_tokens = name, model, max_tokens
        self.template, self.request = read_template(template, f"judge {name!r}"), dict(request or {})

    def __call__(self, prompts: list, first: list[str], second: list[str]) -> list[float | None]:
        def verdict(number: int) -> float | None:
            return self.one(prompts[number], first[number], second[number], f"pair {number}")

        return self.each(verdict, range(len(prompts)))

    def one(self, prompt: Any, first: str, second: str, pair: str) -> float | None:
        """Its verdict on one pair, which errors call `pair`."""
        content = {
            "model": self.model,
            "messages": [{"role": "user", "content": question(self.template, prompt, first, second)}],
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
            **self.request,
        }
        where = f"judge {self.name!r} at {self.shown}, {pair}"
        answer = self.ask(content, where)
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise RewardError(
                f"{where}: the answer has no choices[0].message.content: {str(answer)[:200]!r}. Is the url that of "
                "chat completions (.../v1/chat/completions)?"
            ) from error
        return read_verdict(text or "")
