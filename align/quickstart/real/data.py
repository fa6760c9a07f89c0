"""The preference pairs of the quickstart on a real model: read, turned into messages, measured and shared out."""

import random
from typing import Any

from align.data import load_rows, tokenize_pairs
from align.data.bad_rows import BadRow, BadRows
from align.data.checks import pair_of
from align.data.dialogue import SHARE, convert_dialogues, dialogue_share
from align.data.formats import format_for
from align.errors import ConfigError
from align.quickstart.real.settings import RealSettings

MAX_BAD_SHARE = 0.05  # hh-rlhf has 1.6 % of rows in which an answer is empty or holds a turn of the human


def read_pairs(settings: RealSettings, tokenizer) -> list[dict[str, Any]]:
    """The usable pairs, as messages {"prompt", "chosen", "rejected"}, with `prompt_tokens`, in the order of the file.

    Dialogues written as text become messages, and plain prompts a user's message. Left out are pairs whose prompt is
    longer than `max_pair_prompt` tokens (with the chat template) or whose longer answer than `max_answer_length`.
    """
    from datasets import Dataset

    rows = load_rows(settings.pairs, "train")
    fmt = format_for(rows, "pairs", settings.pairs)
    if not fmt.conversational and dialogue_share(rows) >= SHARE:
        rows, _ = convert_dialogues(rows, max_bad_share=MAX_BAD_SHARE, source=settings.pairs)
        fmt = format_for(rows, "pairs", settings.pairs)
    report = BadRows(source=settings.pairs, total=len(rows))
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(_messages(*pair_of(row, fmt)))
        except BadRow as reason:
            report.add(number, str(reason))
    report.check(MAX_BAD_SHARE)
    tokens = tokenize_pairs(Dataset.from_list(found), tokenizer, max_length=None, source=settings.pairs)
    return [
        {**found[row["row"]], "prompt_tokens": len(row["prompt_ids"])}
        for row in tokens
        if len(row["prompt_ids"]) <= settings.max_pair_prompt
        and max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= settings.max_answer_length
    ]


def _messages(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    def as_message(role: str, value: Any) -> list[dict[str, str]]:
        return [{"role": role, "content": value.strip()}] if isinstance(value, str) else value

    return {
        "prompt": as_message("user", prompt),
        "chosen": as_message("assistant", chosen),
        "rejected": as_message("assistant", rejected),
    }


def share_out(pairs: list[dict[str, Any]], settings: RealSettings, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Pairs by who gets them: `held_out`, `member_0` ..., `gold` (none, where the gold reward is given).

    Drawn without replacement, after pairs of a prompt that came before are dropped, so that no prompt is in two shares.
    Raises ConfigError where there are too few.
    """
    by_prompt: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        by_prompt.setdefault(str(pair["prompt"]), pair)
    unique = list(by_prompt.values())
    sizes = {"held_out": settings.held_out}
    sizes |= {f"member_{i}": settings.pairs_per_member for i in range(settings.members)}
    sizes |= {"gold": 0 if settings.gold else settings.gold_pairs}
    needed = sum(sizes.values())
    if needed > len(unique):
        raise ConfigError(
            f"{settings.pairs} has {len(unique)} pairs with different prompts of at most {settings.max_pair_prompt} "
            f"tokens and answers of at most {settings.max_answer_length}, and {needed} are needed: give more pairs"
        )
    random.Random(f"pairs {seed}").shuffle(unique)
    shares, start = {}, 0
    for name, size in sizes.items():
        shares[name], start = unique[start : start + size], start + size
    return shares


def prompts_of(shares: dict[str, list[dict[str, Any]]], settings: RealSettings) -> dict[str, list[dict[str, Any]]]:
    """Prompts to train (of the members' pairs) and to evaluate on (of the held-out ones), those that are short enough
    for rollouts. Raises ConfigError where these are too few."""
    of_members = [pairs for name, pairs in shares.items() if name.startswith("member_")]
    members = [pair for one_of_each in zip(*of_members, strict=True) for pair in one_of_each]
    sources = {"train": (members, settings.train_prompts), "eval": (shares["held_out"], settings.eval_prompts)}
    found = {}
    for name, (pairs, wanted) in sources.items():
        short = [{"prompt": pair["prompt"]} for pair in pairs if pair["prompt_tokens"] <= settings.max_prompt_length]
        if len(short) < wanted:
            raise ConfigError(
                f"{settings.pairs}: {wanted} prompts to {name} on are needed, and {len(short)} have at most "
                f"{settings.max_prompt_length} tokens: give pairs with shorter prompts"
            )
        found[name] = short[:wanted]
    return found
