"""What one row must be before it is tokenised: functions that return its parts in one shape, or raise BadRow."""

import ast
import json
import math
import re
from collections.abc import Callable
from typing import Any

from align.data.bad_rows import BadRow
from align.data.formats import DataFormat
from align.data.messages import OTHER_CALLS, check_calls, tools_of, with_role

Text = Any  # a string, or a list of messages where `DataFormat.conversational`: the format decides, not the type

REPEATED = "repeats the prompt (drop the column prompt, it is then taken from the pair)"
SHORT = 20  # characters: two answers may well begin with a prompt that is shorter

# Raw dialogues of the hh-rlhf kind: the answer starts after the last of these.
TURN_MARKER = "\n\nAssistant:"
HUMAN_TURN = "\n\nHuman:"
SPEAKER = re.compile(r"(?:\A|\n)[ \t]*(?:#+[ \t]*)?([A-Z][a-z]*):")
"""The name at the start of a line."""
HUMANS, ASKERS = ("Human", "User"), ("Q", "Question", "Instruction", "Input")

SCORE = "score"
"""Column of the given reward of a demonstration."""

CUT = re.compile(r"""\s*\[?\s*\{\s*["']role["']\s*:\s*["'](system|user|assistant)["']\s*,\s*["']content["']\s*:""")
"""How messages begin whose end is cut off."""

OURS = {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_assistant_tokens_mask"}
"""Arguments of `apply_chat_template` that decide what is rendered, and are set here."""

ROLES = ("system", "developer", "user", "human", "assistant", "gpt", "bot", "tool", "function")


def prompt_of(row: dict[str, Any], fmt: DataFormat, completed: bool = False) -> Text:
    """The prompt of a row in any format that has one. completed: an environment adds to the last message, which may be
    empty."""
    if fmt.implicit_prompt and fmt.conversational:
        return _asked(row)
    if fmt.implicit_prompt:
        return pair_of(row, fmt)[0]
    return _prompt(row, fmt.conversational, completed)


def _asked(row: dict[str, Any]) -> Text:
    """The messages that both conversations begin with, up to the last that is answered: the answers may be the same, or
    empty, as in sets of prompts alone."""
    chosen, rejected = (_value(row[name], name, True) for name in ("chosen", "rejected"))
    prompt = chosen[: _shared_messages(chosen, rejected)]
    while prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if not prompt:
        raise BadRow("chosen and rejected share no prompt")
    return _prompt({"prompt": prompt}, True)


def completion_of(row: dict[str, Any], fmt: DataFormat) -> tuple[Text, Text]:
    """(prompt, completion) of a prompt-completion or preference row; of the latter the chosen one."""
    if fmt.kind == "preference":
        prompt, chosen, _ = _pair(row, fmt)
        return prompt, chosen
    prompt = _prompt(row, fmt.conversational)
    completion = _completion(row["completion"], "completion", prompt, fmt.conversational)
    if not fmt.conversational and len(prompt) >= SHORT and completion.startswith(prompt):
        raise BadRow("completion repeats the prompt")
    _check_dialogue(prompt, completion, "completion")
    return prompt, completion


def pair_of(row: dict[str, Any], fmt: DataFormat, scored: bool = False) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a preference row; an implicit prompt is taken out of the two texts.

    Where every token of an answer is trained as the policy's, an answer in which somebody else speaks is a bad row.
    scored: the answers are scored at their ends instead, so anybody may speak before the assistant's last word.
    """
    prompt, *answers = _pair(row, fmt)
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not scored:
            _check_speaker(answer, name, fmt)
            _check_dialogue(prompt, answer, name)
        elif fmt.conversational and answer[-1]["role"] != "assistant":
            raise BadRow(f"{name} does not end with an assistant message")
    return prompt, *answers


def answer_of(row: dict[str, Any], fmt: DataFormat) -> tuple[Text, Text]:
    """(prompt, completion) of a prompt-completion row whose completion is trained whole, as `pair_of` checks it."""
    prompt, completion = completion_of(row, fmt)
    _check_speaker(completion, "completion", fmt)
    return prompt, completion


def _check_speaker(answer: Text, name: str, fmt: DataFormat) -> None:
    others = sorted({m["role"] for m in answer} - {"assistant"}) if fmt.conversational else []
    if others:
        raise BadRow(
            f"{name} has a message of the role {others[0]}, which would be trained as the policy's (put the turns "
            "before the last answer into prompt)"
        )
    if fmt.conversational and any(message.get("weight") == 0 for message in answer):
        raise BadRow(
            f"{name} has a message of weight 0, which would be trained as all of an answer is (leave the weight out, "
            "or put the turns before the last answer into prompt)"
        )
    if fmt.conversational and len(answer) > 1:
        raise BadRow(
            f"{name} has {len(answer)} messages of the assistant, and what the template writes between them would be "
            "trained as the policy's (join them into one)"
        )


def _check_dialogue(prompt: Text, answer: Text, name: str) -> None:
    """BadRow for an answer of a dialogue written as text in which the human, who has a line in the prompt, speaks
    again. A Q: or ### Instruction: is a turn where the prompt's last name (A:, ### Response:) answers it: tables and
    quotations have such lines too."""
    if not isinstance(answer, str) or not prompt.rstrip().endswith(":"):
        return
    named = SPEAKER.findall(prompt)
    if not named or not prompt.rstrip().endswith(f"{named[-1]}:"):
        return
    own, asking = named[-1], {*named[:-1]}
    if own == "Assistant" and HUMAN_TURN in answer:
        asking.add("Human")
    turns = SPEAKER.findall("." + answer)  # the answer's beginning is the last name's own line
    for place, other in enumerate(turns):
        if other in asking and (other in HUMANS or (other in ASKERS and own in turns[place:])):
            raise BadRow(
                f"{name} has a further turn of {other}:, which would be trained as the policy's (put the turns before "
                "the last answer into prompt)"
            )


def _pair(row: dict[str, Any], fmt: DataFormat) -> tuple[Text, Text, Text]:
    if fmt.scored:
        row = {**row, **best_and_worst(row)}
    chosen = _value(row["chosen"], "chosen", fmt.conversational)
    rejected = _value(row["rejected"], "rejected", fmt.conversational)
    if _same(chosen, rejected):
        raise BadRow("chosen equals rejected")
    if fmt.implicit_prompt:
        cut = _shared_messages(chosen, rejected) if fmt.conversational else _shared_text(chosen, rejected)
        if cut == 0:
            raise BadRow("chosen and rejected share no prompt")
        row = {**row, "prompt": chosen[:cut]}
        chosen, rejected = chosen[cut:], rejected[cut:]
    prompt = _prompt(row, fmt.conversational)
    if not fmt.conversational and len(prompt) >= SHORT and chosen.startswith(prompt) and rejected.startswith(prompt):
        raise BadRow(f"chosen {REPEATED}")
    return (
        prompt,
        _completion(chosen, "chosen", prompt, fmt.conversational),
        _completion(rejected, "rejected", prompt, fmt.conversational),
    )


def best_and_worst(row: dict[str, Any]) -> dict[str, Any]:
    """The pair that `completions` and `scores` make, `chosen` with the highest score and `rejected` with the lowest (of
    equal ones the first), and their scores; BadRow where there is no such pair."""
    answers, scores = row["completions"], row["scores"]
    for name, values in (("completions", answers), ("scores", scores)):
        if values is None:
            raise BadRow(f"{name} is missing")
        if not isinstance(values, list):
            raise BadRow(f"{name} is {type(values).__name__} instead of a list")
    if len(answers) != len(scores):
        raise BadRow("completions and scores differ in number")
    if len(answers) < 2:
        raise BadRow("completions has fewer than two answers")
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        raise BadRow("scores has something else than finite numbers")
    best, worst = max(range(len(scores)), key=scores.__getitem__), min(range(len(scores)), key=scores.__getitem__)
    if scores[best] == scores[worst]:
        raise BadRow("scores are all the same, so no answer is the better one")
    return {
        "chosen": answers[best],
        "rejected": answers[worst],
        "chosen_score": float(scores[best]),
        "rejected_score": float(scores[worst]),
    }


def check_pair_numbers(row: dict[str, Any], note: Callable[[str], None] = lambda text: None) -> None:
    """Raise BadRow for a `margin` or `chosen_prob` (the probability that chosen is preferred) that cannot be one. Note
    a margin below 0: the sign of a verdict, say, which was kept when the better answer became `chosen`."""
    for name in ("margin", "chosen_prob"):
        if name not in row:
            continue
        if row[name] is None:
            raise BadRow(f"{name} is missing")
        if not isinstance(row[name], int | float) or not math.isfinite(row[name]):
            raise BadRow(f"{name} is not a finite number")
    if not 0 <= row.get("chosen_prob", 1) <= 1:
        raise BadRow("chosen_prob is not a probability in [0, 1]")
    if row.get("margin", 0) < 0:
        note("margin is below 0, which says that the rejected answer is the better one")


def check_score(row: dict[str, Any]) -> None:
    """Raise BadRow for a `score` outside [0, 1]. One that is missing is a demonstration's, 1."""
    score = row.get(SCORE)
    if score is not None and not (isinstance(score, int | float) and 0 <= score <= 1):  # NaN is in no range
        raise BadRow(f"{SCORE} is not a number in [0, 1]")


def text_of(row: dict[str, Any], fmt: DataFormat) -> Text:
    """The `text` or `messages` of a language-modelling row."""
    name = next(column for column in ("messages", "conversations", "text") if column in row)
    value = _value(row[name], name, fmt.conversational)
    answers = [message for message in value if message["role"] == "assistant"] if fmt.conversational else []
    if fmt.conversational and not any(map(said, answers)):
        raise BadRow("messages has no assistant message" + " that says anything" * bool(answers))
    if not fmt.conversational and not value.strip():
        raise BadRow(f"{name} is empty")
    return value


def template_kwargs(row: dict[str, Any], tools: bool = False) -> dict[str, Any]:
    """TRL's per-row arguments of the chat template, the functions of the column `tools` among them if `tools`. What
    cannot be honoured is refused."""
    for name in ("images", "image") if tools else ("tools", "images", "image"):
        if row.get(name):
            if name == "tools":
                raise BadRow("tools are not supported here, only in demonstrations and pairs that are trained on")
            raise BadRow(f"{name} are not supported, only text")
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadRow(f"chat_template_kwargs is {type(options).__name__} instead of names and values")
    if taken := sorted(OURS & options.keys()):
        raise BadRow(f"chat_template_kwargs has {taken[0]}, which is no variable of a chat template")
    offered = tools_of(row) if tools else []
    return {**({"tools": offered} if offered else {}), **{k: v for k, v in options.items() if v is not None}}


def typed_tokens(messages: Text, tokens: list[str]) -> list[str]:
    """Which of the control tokens somebody typed into the content of a message."""
    return [token for token in tokens if any(token in message["content"] for message in messages)]


def _prompt(row: dict[str, Any], conversational: bool, completed: bool = False) -> Text:
    prompt = _value(row["prompt"], "prompt", conversational)
    if not conversational:
        if not prompt.strip():
            raise BadRow("prompt is empty")
        return prompt
    if not completed and not prompt[-1]["content"].strip():
        raise BadRow("prompt ends in an empty message")
    if prompt[-1]["role"] == "assistant":
        raise BadRow("prompt ends with an assistant message, so there is nothing to answer")
    return prompt


def _completion(value: Any, name: str, prompt: Text, conversational: bool) -> Text:
    completion = _value(value, name, conversational)
    if not conversational:
        if not completion.strip():
            raise BadRow(f"{name} is empty")
        return completion
    if completion[: len(prompt)] == prompt:
        raise BadRow(f"{name} {REPEATED}")
    if completion[0]["role"] != "assistant":
        raise BadRow(f"{name} does not start with an assistant message")
    if not any(said(message) for message in completion if message["role"] == "assistant"):
        raise BadRow(f"{name} is empty")
    return completion


def _value(value: Any, name: str, conversational: bool) -> Text:
    if value is None:
        raise BadRow(f"{name} is missing")
    if not conversational:
        if not isinstance(value, str):
            raise BadRow(f"{name} has the wrong type ({type(value).__name__} instead of text)")
        if name == "messages" or _is_written_messages(value):
            raise BadRow(f"{name} is text that should be messages (parse it: a list of role and content)")
        return value
    if not isinstance(value, list):
        raise BadRow(f"{name} has the wrong type ({type(value).__name__} instead of a list of messages)")
    if not value:
        raise BadRow(f"{name} is empty")
    if name != "messages" and all(isinstance(part, str) for part in value):
        raise BadRow(f"{name} is a list of texts: each row has one (docs/data.md, published sets)")
    return [_message(message, name) for message in value]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"{name} has a malformed message ({type(message).__name__} instead of role and content)")
    message = with_role(message)
    calls = message.get("tool_calls")
    if calls:
        check_calls(message, name)
        message = {**message, "content": message.get("content") or ""}  # a call needs no text beside it
    if isinstance(message.get("content"), list):
        kinds = {str(part.get("type")) for part in message["content"] if isinstance(part, dict)}
        if kinds - {"text"}:
            raise BadRow(f"{name} has content of the type {sorted(kinds - {'text'})[0]}: images are not supported")
    if message.get("weight") not in (None, 0, 1):
        raise BadRow(f"{name} has a message of weight {message['weight']!r:.20}: it is trained (1) or not (0)")
    for key in ("role", "content"):
        if message.get(key) is None:
            raise BadRow(f"{name} has a malformed message (no {key})")
        if not isinstance(message[key], str):
            raise BadRow(f"{name} has a malformed message ({key} is {type(message[key]).__name__} instead of text)")
    if message["role"] in OTHER_CALLS:
        raise BadRow(
            f"{name} has a message of the role {message['role']}, which would not be trained: write the call into "
            "tool_calls of an assistant message"
        )
    # Arrow fills keys that only other rows have with None; templates would take these for given.
    return {key: item for key, item in message.items() if item is not None and not (key == "tool_calls" and not item)}


def said(message: dict[str, Any]) -> bool:
    """Whether a message holds anything: text, or a call of a tool."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def _is_written_messages(text: str) -> bool:
    """Whether a text is messages, or one of them, as JSON, Python or NumPy write them (a CSV file has them so)."""
    text = text.strip().removeprefix("\ufeff")  # of a file that an editor marked as UTF-8
    if not (re.match(r"""[\[({"]""", text) and re.search(r"""["'](role|from)\\*["']\s*:""", text)):
        return False
    value = _written(text)
    if value is None:
        return CUT.match(text) is not None
    if isinstance(value, str):  # written twice
        return value != text and _is_written_messages(value)
    if isinstance(value, dict):
        return _is_message(value) or any(map(_are_messages, value.values()))
    return _are_messages(value)


def _are_messages(value: Any) -> bool:
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        value = value[0]
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_message, value))


def _written(text: str) -> Any:
    """The value of a text that is JSON, JSON lines, or a literal of Python or NumPy; None for any other text."""
    parted = re.sub(r"\}\s*\{", "}, {", text.strip())
    for read, written in (
        (json.loads, text),
        (ast.literal_eval, parted),
        (json.loads, f"[{parted}]"),
        (ast.literal_eval, f"[{parted}]"),
    ):
        try:
            value = read(written)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, str | list | tuple | dict):
            return value
    return None


def _is_message(value: Any) -> bool:
    """As chat data has them, and no other JSON with a `role`."""
    return isinstance(value, dict) and any(
        {role, content} <= value.keys() and value[role] in ROLES
        for role, content in (("role", "content"), ("from", "value"))
    )


def _same(a: Text, b: Text) -> bool:
    if isinstance(a, str):
        return a.strip() == b.strip()
    parts = [[(m["role"], m["content"].strip(), m.get("tool_calls")) for m in text] for text in (a, b)]
    return parts[0] == parts[1]


def _shared_messages(chosen: list, rejected: list) -> int:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return shared


def _shared_text(chosen: str, rejected: str) -> int:
    """Length of the shared beginning, moved back so that no word of an answer is in the prompt.

    Two answers often start with the same words, and the characters alone do not tell where the prompt ends: a dialogue
    ends after the last shared turn marker; anything else before the word in which the texts part.
    """
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared += 1
    turn = chosen.rfind(TURN_MARKER, 0, shared)
    if turn >= 0:
        return turn + len(TURN_MARKER)
    while shared > 0 and not chosen[shared - 1].isspace():
        shared -= 1
    # The space belongs to the word that follows it, as tokenizers have it.
    return len(chosen[:shared].rstrip(" "))
