"""Rows of any kind at the door of every trainer: each is tokenised as it should be, or left out with a reason."""

import json
import random
import time
import traceback
from pathlib import Path

from align.data import (
    BadRows,
    load_rows,
    tokenize_completions,
    tokenize_pairs,
    tokenize_prompts,
    tokenize_ranked,
    tokenize_unpaired,
    toy,
)
from align.errors import AlignError
from align.methods import METHODS
from benchmarks.faults.tally import Tally
from benchmarks.faults.world import draw

SET = 20
"""Rows of a data set; the first is good."""
LENGTHS = {
    "prompts": {"max_prompt_length": 16},
    "completions": {"max_length": 24},
    "pairs": {"max_length": 24},
    "ranked": {"max_length": 24},
    "unpaired": {"max_length": 24},
}
DOORS = {
    "prompts": tokenize_prompts,
    "completions": tokenize_completions,
    "pairs": tokenize_pairs,
    "ranked": tokenize_ranked,
    "unpaired": tokenize_unpaired,
}
COLUMNS = {
    "prompts": ("prompt",),
    "completions": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"),
    "ranked": ("prompt",),
    "unpaired": ("prompt", "completion"),
}
CHAT = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def text(rng: random.Random) -> object:
    """What may stand in a column of text."""
    words = " ".join(rng.choices(toy.words(), k=rng.randint(1, 6)))
    return rng.choice(
        [
            *([words] * 6),
            *("", " ", "\n\t", "\u200b", "<eos>", f"{words} <eos>", f"<eos> {words}", "<pad>", "\ufffd", "𝔘\u0301" * 3),
            *(None, 3, -0.5, True, [], {}, ["a"], {"role": "user"}, words * 40, "\x00", "\u2028", "None", "nan"),
        ]
    )


def message(rng: random.Random) -> object:
    made = {"role": rng.choice(["user", "assistant", "system", "tool", "", None, 3]), "content": text(rng)}
    if rng.random() < 0.1:
        made.pop(rng.choice(list(made)))
    if rng.random() < 0.05:
        made["tool_calls"] = [{"name": "f"}]
    return rng.choice([*([made] * 9), "hello", None])


def messages(rng: random.Random, last: str) -> object:
    words = " ".join(rng.choices(toy.words(), k=3))
    good = [{"role": "user", "content": words}] if last == "user" else [{"role": "assistant", "content": words}]
    return rng.choice([good, good, good, [message(rng) for _ in range(rng.randint(0, 3))], text(rng)])


def row(rng: random.Random, use: str, chat: bool) -> dict:
    names = COLUMNS[use]
    if chat:
        made = {name: messages(rng, "user" if name == "prompt" else "assistant") for name in names}
    else:
        made = {name: text(rng) for name in names}
    if use == "pairs" and rng.random() < 0.1:
        made["rejected"] = made["chosen"]
    if use == "pairs" and rng.random() < 0.1:
        made["margin"] = rng.choice([1, 0.5, "x", None])
    if use == "ranked":
        made |= answers(rng, chat)
    if use == "unpaired":
        made["label"] = rng.choice([*([True, False] * 8), 1, 0, 0.0, None, 2, -1, "true", "", [], float("nan")])
    if rng.random() < 0.03:
        made.pop(rng.choice(sorted(made)))
    return made


def answers(rng: random.Random, chat: bool) -> dict:
    """What may stand for a list of answers and their scores."""
    count = rng.choice([0, 1, 2, 2, 3, 3, 4])
    made: list = [messages(rng, "assistant") if chat else text(rng) for _ in range(count)]
    if count > 1 and rng.random() < 0.1:
        made[-1] = made[0]
    scores: list = [rng.choice([1, 2.5, -3, 0, rng.random()]) for _ in range(count)]
    if rng.random() < 0.15:
        scores.append(rng.choice([1.0, None, "x", float("nan"), True, 10**400, []]))
        scores.pop(rng.randrange(len(scores)))
    return {
        "completions": rng.choice([*([made] * 20), None, "rose", {}, 3]),
        "scores": rng.choice([*([scores] * 20), scores[:1], None, "x", 3]),
    }


def good(use: str, chat: bool) -> dict:
    words: dict = dict(zip(COLUMNS[use], ("describe the garden", "rose soil", "stupid"), strict=False))
    label = {"label": True} if use == "unpaired" else {"scores": [0.5, 2.0]} if use == "ranked" else {}
    texts = ["rose soil", "stupid"]
    if not chat:
        return words | label | ({"completions": texts} if use == "ranked" else {})
    roles = {name: "user" if name == "prompt" else "assistant" for name in words}
    lists = {"completions": [[{"role": "assistant", "content": value}] for value in texts]} if use == "ranked" else {}
    return {name: [{"role": roles[name], "content": value}] for name, value in words.items()} | label | lists


def problem_with(made: dict, use: str, vocabulary: int) -> str | None:
    """What is wrong with a row that was taken."""
    limit = next(iter(LENGTHS[use].values()))
    if use == "completions":
        ids, mask = made["input_ids"], made["completion_mask"]
        parts = [ids]
        if len(mask) != len(ids) or not any(mask[1:]):
            return "no token is trained"
    else:
        parts = [made["prompt_ids"]]
        if use == "unpaired":
            parts = [made["prompt_ids"] + made["completion_ids"]]
            if made["label"] not in (True, False) or not made["completion_ids"]:
                return "there is nothing to learn from"
        if use == "ranked":
            lengths = [length for length in made["lengths"] if length]  # a shorter list ends in zeros
            if (
                len(lengths) < 2
                or lengths[0] != len(made["chosen_ids"])
                or sum(lengths[1:]) != len(made["rejected_ids"])
            ):
                return f"answers of {made['lengths']} tokens"
            parts = [[*made["prompt_ids"], *range(length)] for length in lengths]
        if use == "pairs":
            parts = [made["prompt_ids"] + made[name] for name in ("chosen_ids", "rejected_ids")]
            if made["chosen_ids"] == made["rejected_ids"] or not made["chosen_ids"] or not made["rejected_ids"]:
                return "there is no difference to learn from"
    if any(not part or len(part) > limit for part in parts):
        return f"{[len(part) for part in parts]} tokens, the limit is {limit}"
    if any(not 0 <= token < vocabulary for part in parts for token in part):
        return "a token is none of the vocabulary"
    return None


def one(tally: Tally, path: Path, rng: random.Random, method: str, tokenizers: tuple) -> None:
    """One data set at the door of one method."""
    use, chat, area = METHODS[method].data, rng.random() < 0.5, f"generated rows, {METHODS[method].data}"
    rows = [good(use, chat), *(row(rng, use, chat) for _ in range(SET - 1))]
    path.write_text("\n".join(json.dumps(r, ensure_ascii=rng.random() < 0.5) for r in rows) + "\n")
    tokenizer, report = tokenizers[chat], BadRows()
    what = f"align {method} on {path.read_text()!r}"
    try:
        found = DOORS[use](load_rows(path), tokenizer, max_bad_share=1.0, report=report, **LENGTHS[use])
        taken = {made["row"]: made for made in found}
    except AlignError as error:
        outcome = "refused" if path.name in str(error) or "rows" in str(error) else "wrong"
        for _ in rows:
            tally.add(area, outcome, f"{what}: {error}")
        return
    except Exception:  # a traceback is what is looked for
        tally.add(area, "wrong", f"{what}: {traceback.format_exc()[-1500:]}")
        return
    refused = {number for numbers in report.reasons.values() for number in numbers}
    for number in range(len(rows)):
        if (number in refused) == (number in taken):
            tally.add(area, "wrong", f"{what}: row {number} is both taken and refused, or neither")
        elif number in refused:
            tally.add(area, "refused")
        else:
            problem = problem_with(taken[number], use, len(tokenizer))
            tally.add(area, "wrong" if problem else "exact", f"{what}: row {number}: {problem}")


def run(tally: Tally, folder: Path, data: Path, seed: int, number: int, until: float) -> None:
    folder.mkdir(parents=True)
    plain, chat = toy.tokenizer(), toy.tokenizer()
    chat.chat_template = CHAT
    rng = draw(seed, "rows")
    for index in range(number // SET):
        if time.monotonic() > until:
            return
        one(tally, folder / f"rows{index}.jsonl", rng, rng.choice(sorted(METHODS)), (plain, chat))
