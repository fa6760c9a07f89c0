"""Pairs that the user tokenised: the limits and checks of text, on ids that are taken as they are."""

import warnings
from typing import TYPE_CHECKING, Any

from align.data import checks
from align.data.bad_rows import BadRow, BadRows
from align.data.passes import Columns, Note, Recipe, started, tokenized

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
MASKS = ("chosen_mask", "rejected_mask")
"""1 on the tokens of an answer that are trained, of pairs in which others speak too; without them all are."""
WHOLE = (("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids"))
"""Columns of whole sequences, as TRL's reward trainer takes them; the second pair of names is its older one."""


def limited_pairs(
    dataset: "Dataset | IterableDataset",
    tokenizer: Any,
    *,
    max_length: int | None,
    max_bad_share: float = 0.0,
    source: str = "",
    report: BadRows | None = None,
    num_proc: int | None = None,
) -> Any:
    """Tokenised pairs with their completions cut so that prompt and completion have at most `max_length` tokens, as
    `tokenize_pairs` cuts those of text; no end token is added.

    Takes the columns `IDS`, or whole sequences (`WHOLE`), whose prompt is what both begin with. A bad row is one with
    an empty column, with a prompt that leaves no room, or whose completions are the same tokens, also after the cut.
    """
    report, sample = started(report, source, dataset, streams=True)
    names = next((pair for pair in WHOLE if {*pair} <= {*sample.column_names}), IDS[1:])
    whole = IDS[0] not in sample.column_names
    masked = [name for name in MASKS if name in sample.column_names and not whole]
    if names == WHOLE[1]:
        warnings.warn(
            f"{' and '.join(names)} are TRL's older names of {' and '.join(WHOLE[0])}, which are deprecated and will "
            "not be supported in v1 of TRL: rename the columns",
            FutureWarning,
            stacklevel=2,
        )

    def prepare(row: Columns, note: Note) -> tuple[Columns, Columns]:
        checks.check_pair_numbers(row, note)
        ids = {name: row.get(old) for name, old in zip(IDS, (IDS[0], *names), strict=True)}
        for name in IDS[1:] if whole else IDS:
            if not ids[name]:
                raise BadRow(f"{name} is {'missing' if ids[name] is None else 'empty'}")
        masks = {name: row[name] for name in masked}
        for name, mask in masks.items():
            if len(mask or ()) != len(ids[f"{name.removesuffix('_mask')}_ids"] or ()):
                raise BadRow(f"{name} has another length than the tokens")
        return (_split(ids) if whole else ids | masks), {}

    def finish(ids: Columns, note: Note) -> Columns:
        return cut_pair(ids, max_length, note)

    recipe = Recipe(prepare, list, finish, dict.fromkeys(IDS, "int32") | dict.fromkeys(masked, "int8"))
    limits = {"use": "tokenised pairs", "max_length": max_length}
    return tokenized(dataset, tokenizer, recipe, limits, report, max_bad_share=max_bad_share, num_proc=num_proc)


def cut_pair(ids: Columns, max_length: int | None, note: Note) -> Columns:
    """The lists of a pair within `max_length`; BadRow where nothing is left that tells the answers apart, or that is
    trained."""
    prompt = ids["prompt_ids"]
    check_room(prompt, max_length)
    room, cut = None if max_length is None else max_length - len(prompt), {}
    for name in ("chosen", "rejected"):
        cut[f"{name}_ids"] = ids[f"{name}_ids"][:room]
        if len(cut[f"{name}_ids"]) < len(ids[f"{name}_ids"]):
            note(f"{name} is cut at max_length={max_length}")
    if cut["chosen_ids"] == cut["rejected_ids"]:
        shortened = any(len(cut[name]) < len(ids[name]) for name in cut)
        raise BadRow("chosen and rejected are the same tokens" + (" after the cut at max_length" if shortened else ""))
    masks = {name: ids[name][:room] for name in MASKS if name in ids}
    for name, mask in masks.items():
        if not any(mask):
            raise BadRow(
                f"no token of {name.removesuffix('_mask')} is trained"
                + (" after the cut at max_length" if any(ids[name]) else "")
            )
    return {"prompt_ids": prompt, **cut, **masks}


def check_room(prompt_ids: list[int], max_length: int | None) -> None:
    if max_length is not None and len(prompt_ids) >= max_length:
        raise BadRow(f"prompt leaves no room for a completion within max_length={max_length} tokens")


def _split(ids: Columns) -> Columns:
    """Whole sequences -> prompt and completions; neither completion is empty."""
    chosen, rejected = ids["chosen_ids"], ids["rejected_ids"]
    shared, most = 0, min(len(chosen), len(rejected)) - 1
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise BadRow("chosen and rejected begin with no common token, so there is no prompt")
    return {"prompt_ids": chosen[:shared], "chosen_ids": chosen[shared:], "rejected_ids": rejected[shared:]}
