"""Answers that are labelled good or bad on their own: `prompt`, `completion`, `label` (KTO)."""

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data import checks
from align.data.bad_rows import BadRow, BadRows
from align.data.dialogue import warn_of_dialogues
from align.data.encode import Encoded, check_tokenizer, encode, render_pair
from align.data.ending import ending_of
from align.data.formats import SCORED, check_tokens, columns_of, format_for
from align.data.limits import lengths_of
from align.data.passes import Columns, Note, Recipe, numbered, started, tokenized
from align.data.rows import source_of
from align.data.tokenize import check_inside, check_prompt, closed, controls_of, note_typed, tokenize_pairs
from align.data.tokenized import check_room
from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

UNPAIRED = ("prompt_ids", "completion_ids", "label")
DESIRABLE = {"true", "yes", "1", "good", "desirable", "desired", "chosen", "accepted", "preferred", "positive", "pos"}
DESIRABLE |= {"liked", "like", "up", "thumbs_up", "correct"}
UNDESIRABLE = {"false", "no", "0", "bad", "undesirable", "undesired", "rejected", "dispreferred", "negative", "neg"}
UNDESIRABLE |= {"disliked", "dislike", "down", "thumbs_down", "incorrect", "wrong"}
SEED = 0  # of the order in which answers are mismatched: not the run's, so that runs share cached log-probs


def tokenize_unpaired(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_bad_share: float = 0.0,
    source: str = "",
    report: BadRows | None = None,
    num_proc: int | None = None,
) -> "Dataset":
    """Labelled answers: columns `prompt_ids`, `completion_ids`, `label` (bool), `row`, and every other column.

    Preference pairs serve as well: each is two rows, the chosen answer desirable and the rejected one not, with the
    pair's number (`unpair`). A row whose `label` is neither true nor false (nor 1 or 0) is bad; those of a `ClassLabel`
    are read by their names. The completion is cut as `tokenize_pairs` cuts. Rows that are tokenised already are checked
    and cut.

    Otherwise as `tokenize_prompts`.
    """
    columns = columns_of(dataset, source)
    options: dict[str, Any] = {
        "max_length": max_length,
        "max_bad_share": max_bad_share,
        "source": source,
        "num_proc": num_proc,
    }
    if ({"chosen", "rejected"} <= columns or {*SCORED} <= columns) and not {"completion", "label"} <= columns:
        return unpair(tokenize_pairs(dataset, tokenizer, report=report, **options), source)
    report, sample = started(report, source, dataset)
    if "label" not in columns:
        names = ", ".join(repr(name) for name in sorted(columns))
        raise DataError(
            f"{report.source} has no column 'label' that says which answers are good: expected 'prompt', 'completion' "
            f"and 'label' (true or false), or pairs ('chosen' and 'rejected'); found {names}"
        )
    dataset = sample = _by_name(dataset, report.source)
    tokenised = {*UNPAIRED} <= columns
    if tokenised:
        check_tokens(sample, UNPAIRED[:2], report.source)
    if tokenised and _usable(dataset, max_length):
        return _as_they_are(dataset)
    recipe = _recipe_of_ids(max_length) if tokenised else _recipe_of_text(sample, tokenizer, report.source, max_length)
    limits = {"use": "unpaired", "tokenised": tokenised, "max_length": max_length}
    return tokenized(dataset, tokenizer, recipe, limits, report, max_bad_share=max_bad_share, num_proc=num_proc)


def _by_name(dataset: "Dataset", source: str) -> "Dataset":
    """With a label that is true or false where it is a `ClassLabel`, whose numbers are places in a list of names: the
    second may be "bad". DataError where the names do not say which of them is desirable."""
    from datasets import ClassLabel, Value

    kind = dataset.features["label"]
    if not isinstance(kind, ClassLabel):
        return dataset
    names = [name.lower().replace("-", "_").replace(" ", "_") for name in kind.names]
    good = [name in DESIRABLE for name in names]
    if sorted(good) != [False, True] or names[good.index(False)] not in UNDESIRABLE:
        raise DataError(
            f"{source}: the column 'label' is a ClassLabel with the names {', '.join(kind.names)}, which do not say "
            "what is desirable: name the two rejected and chosen, or make it a column of true (desirable) and false, "
            "with dataset.cast_column('label', Value('bool')) where 1 is desirable"
        )
    labels = [good[label] if label in (0, 1) else None for label in dataset.with_format(None)["label"][:]]
    return dataset.remove_columns("label").add_column("label", labels, feature=Value("bool"))


def _recipe_of_text(sample: "Dataset", tokenizer, source: str, max_length: int | None) -> Recipe:
    from datasets import Value

    fmt = format_for(sample, "unpaired", source)
    if not fmt.conversational:
        warn_of_dialogues(sample, tokenizer, source)
    check_tokenizer(tokenizer, fmt.conversational, needs_eos=True)
    ending, controls = ending_of(tokenizer, fmt.conversational), controls_of(tokenizer)

    def prepare(row: Columns, note: Note) -> tuple[Any, Columns]:
        label = _label(row)
        prompt, completion = checks.answer_of(row, fmt)
        if not fmt.conversational:
            return (prompt, [prompt + completion]), {"label": label}
        note_typed("completion", checks.typed_tokens(completion, list(controls.values())), note)
        return render_pair(prompt, [completion], tokenizer, checks.template_kwargs(row, tools=True)), {"label": label}

    def finish(encoded: Encoded, note: Note) -> Columns:
        check_prompt(encoded.prompt_ids, None, tokenizer)
        completion = closed(encoded, 0, "completion", tokenizer, ending, note)
        if not fmt.conversational:
            check_inside("completion", completion[:-1], controls, note, tokenizer)
        return _cut(encoded.prompt_ids, completion, max_length, note)

    columns = {"prompt_ids": "int32", "completion_ids": "int32", "label": Value("bool")}
    return Recipe(prepare, partial(encode, tokenizer, add_bos=not fmt.conversational), finish, columns)


def _usable(dataset: "Dataset", max_length: int | None) -> bool:
    """Whether all tokenised rows are good as they are; looked at many at once, where `_recipe_of_ids` takes a million
    in a minute."""
    labels = dataset.select_columns(["label"]).with_format("arrow")[:]["label"]
    if labels.null_count or not {*labels.unique().to_pylist()} <= {0, 1}:
        return False
    prompts, answers = (lengths_of(dataset, name) for name in UNPAIRED[:2])
    longest = int((prompts + answers).max(initial=0))
    return bool(prompts.all() and answers.all()) and (max_length is None or longest <= max_length)


def _as_they_are(dataset: "Dataset") -> "Dataset":
    """With labels that are true or false, and the rows' numbers."""
    from datasets import Value

    dataset = numbered(dataset)
    return dataset if dataset.features["label"] == Value("bool") else dataset.cast_column("label", Value("bool"))


def _recipe_of_ids(max_length: int | None) -> Recipe:
    from datasets import Value

    def prepare(row: Columns, note: Note) -> tuple[Any, Columns]:
        label = _label(row)
        for name in UNPAIRED[:2]:
            if not row[name]:
                raise BadRow(f"{name} is {'missing' if row[name] is None else 'empty'}")
        return [row[name] for name in UNPAIRED[:2]], {"label": label}

    def finish(ids: Any, note: Note) -> Columns:
        return _cut(ids[0], ids[1], max_length, note)

    columns = {"prompt_ids": "int32", "completion_ids": "int32", "label": Value("bool")}
    return Recipe(prepare, list, finish, columns)


def _label(row: Columns) -> bool:
    label = row["label"]
    if label is None:
        raise BadRow("label is missing")
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise BadRow(f"label is {label!r:.40} instead of true (desirable) or false")
    return bool(label)


def _cut(prompt: list[int], completion: list[int], max_length: int | None, note: Note) -> Columns:
    check_room(prompt, max_length)
    cut = completion[: None if max_length is None else max_length - len(prompt)]
    if len(cut) < len(completion):
        note(f"completion is cut at max_length={max_length}")
    return {"prompt_ids": prompt, "completion_ids": cut}


def unpair(pairs: "Dataset", source: str = "") -> "Dataset":
    """Tokenised pairs as labelled answers: all the chosen ones, then all the rejected ones, without a copy of their
    tokens."""
    from datasets import concatenate_datasets

    sides = []
    for name, label in (("chosen_ids", True), ("rejected_ids", False)):
        side = pairs.select_columns(["prompt_ids", name, "row"]).rename_column(name, "completion_ids")
        sides.append(side.add_column("label", np.full(len(side), label)))
    logger.info(
        "%s: %d preference pairs are trained as %d answers on their own, chosen ones desirable and rejected ones not",
        source_of(pairs, source),
        len(pairs),
        2 * len(pairs),
    )
    return concatenate_datasets(sides)


def mismatched(lengths: np.ndarray, ids: np.ndarray, what: str = "") -> np.ndarray:
    """For each row the number of another one whose prompt differs, [rows]. lengths: of the prompts, [rows]; ids: of
    their tokens, row after row.

    The rows are put in a fixed random order, and each gets the next one there with another prompt: so nearly every
    answer is given away once, and which row gets which follows from the rows alone, not from how they are cut into
    batches. DataError where all prompts are the same; what: the beginning of its message.
    """
    known: dict[bytes, int] = {}
    ends = np.cumsum(lengths)
    prompts = (ids[start:end].tobytes() for start, end in zip(ends - lengths, ends, strict=True))
    groups = np.array([known.setdefault(prompt, len(known)) for prompt in prompts])
    if len(known) < 2:
        raise DataError(
            f"{what}all rows have the same prompt, and KTO's reference point needs answers to other prompts: add rows "
            "with other prompts, or set loss_type: apo_zero_unpaired, which has no reference point"
        )
    order = np.random.default_rng(SEED).permutation(len(groups))
    twice = np.concatenate([order, order])
    differs = groups[twice[:-1]] != groups[twice[1:]]  # the next one in the circle has another prompt
    places = np.where(differs, np.arange(len(differs)), len(twice))
    following = np.minimum.accumulate(places[::-1])[::-1][: len(order)] + 1
    partners = np.empty(len(order), dtype=np.int64)
    partners[order] = twice[following]
    return partners
