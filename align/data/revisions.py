"""Prompts that show an answer and ask for a better one: what SRPO's improver reads."""

import re
from typing import Any

from align.data.messages import answered
from align.errors import ConfigError

TEXT = "{prompt}{answer}\n\n{prompt}"
"""Of texts: the answer once, and the prompt again."""
CHAT = "Give a better answer."
"""Of conversations: a user's turn after the answer."""
_PLACES = re.compile(r"\{(prompt|answer)\}")


def check_template(template: str, *, conversational: bool) -> None:
    """ConfigError for a template that does not show the answer, or that would show its places as they are written."""
    named = set(_PLACES.findall(template))
    if conversational and named:
        raise ConfigError(
            f"revision_template: the rows are conversations, where it is the user's turn after the answer, and "
            f"{{{'}, {'.join(sorted(named))}}} would be written as it is: leave it out",
            key="revision_template",
        )
    if not conversational and "answer" not in named:
        raise ConfigError(
            f"revision_template: the prompts are texts, and {template!r} shows no {{answer}} that could be improved",
            key="revision_template",
        )
    if not template.strip():
        raise ConfigError("revision_template is empty", key="revision_template")


def revision_prompt(prompt: str | list[dict], answer: str | list[dict], template: str | None = None) -> Any:
    """The prompt for a better answer than `answer` to `prompt`, in the form of the prompt.

    A text: the template with {prompt} and {answer} filled in. A conversation: its turns, the answer's, and a turn of
    the user with the template. template: None takes `TEXT` or `CHAT`.
    """
    if isinstance(prompt, str):
        places = {"prompt": prompt, "answer": str(answer)}
        return _PLACES.sub(lambda found: places[found[1]], TEXT if template is None else template)
    turns = [answered(answer)] if isinstance(answer, str) else list(answer)
    return [*prompt, *turns, {"role": "user", "content": CHAT if template is None else template}]
