"""What a model can take: rows that are too long for it, or have tokens it does not know, are refused at the start."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from align.data.formats import holds_tokens
from align.data.labels import IGNORED, LABELS, MASKS
from align.errors import ConfigError, DataError
from align.modeling.rotary import LONG, SHORT, choose_factors, factors_of

if TYPE_CHECKING:
    from datasets import Dataset

    from align.modeling.types import Model

SEQUENCES = (
    *(("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids"), ("prompt_ids",), ("input_ids",)),
    # an answer after a prompt that shows one (SRPO)
    *((f"revise_{shown}_ids", f"{name}_ids") for shown in ("chosen", "rejected") for name in ("chosen", "rejected")),
)
COUNTED = 2000  # rows read at once: of 16k tokens each 130 MB
SHOWN = 5  # rows that an error names
PACKED = "seq_lengths"
"""TRL's column of a packed row: the tokens of each of its documents, whose positions begin at 0 again."""
BY_BATCH = ("longrope", "dynamic")
"""Rotary embeddings that transformers computes otherwise for a whole batch once one of its rows is longer than the
positions that the model was made for. `align.modeling.rotary` chooses for a run with longrope. vLLM has no positions
beyond those of dynamic ones."""


def sequences_in(names: Collection[str], tokens: Callable[[str], bool]) -> list[tuple[str, ...]]:
    """What a model reads of rows with these columns; tokens: whether one of them holds token ids. `input_ids` are read
    alone with the mask of demonstrations, and beside the `prompt_ids` of others they are a column of the user's."""
    found = [group for group in SEQUENCES if set(group) <= set(names) and all(map(tokens, group))]
    whole = ("input_ids",)
    if whole in found and {*MASKS, LABELS} & set(names):
        return [whole]
    return [group for group in found if group != whole or ("prompt_ids",) not in found]


def _sequences_of(dataset: "Dataset") -> list[tuple[str, ...]]:
    return sequences_in(dataset.column_names, lambda name: holds_tokens(dataset.features[name]))


def _are_tokens(value: Any) -> bool:
    """Of one row of a stream."""
    return (
        not isinstance(value, str)
        and hasattr(value, "__len__")
        and not isinstance(next(iter(value), 0), str | list | dict)
    )


class Reader(NamedTuple):
    """What a model takes of rows. limit: tokens of one, None without limit; why: what this comes from."""

    name: str
    limit: int | None
    known: int
    why: str = ""


def reader_of(model: "Model", name: str = "model") -> Reader:
    return Reader(name, longest_input(model), known_tokens(model), _why(model))


def check_fits(model: "Model", dataset: "Dataset", what: str, tokenizer: Any = None, name: str = "model") -> None:
    """Raise DataError for tokenised rows with more tokens than the model has positions, or with unknown token ids.

    what, name: the dataset's and the model's in the message. Of prompts for rollouts only the prompt is counted.
    """
    check_read(reader_of(model, name), dataset, what, tokenizer)


def check_read(reader: Reader, dataset: "Dataset", what: str, tokenizer: Any = None) -> None:
    """`check_fits` of a model that is not held."""
    columns = _sequences_of(dataset)
    labels = {LABELS} & {*dataset.column_names} if ("input_ids",) in columns else set()
    for column in {column for group in columns for column in group} | labels:
        _check_tokens(dataset, column, reader.known, what, tokenizer, reader.name)
    if reader.limit is not None:
        for group in columns:
            _check_lengths(dataset, group, reader.limit, what, f"{reader.name} takes{reader.why}")


def check_reads(model: "Model", name: str, *, tokens: int, length: int) -> None:
    """ConfigError for a model beside the policy that cannot read its completions: ids below `tokens`, `length` of them
    with the prompt."""
    limit, known = longest_input(model), known_tokens(model)
    if known < tokens:
        raise ConfigError(
            f"the {name} has embeddings for {known} tokens, and the policy's tokenizer has {tokens}: it is of another "
            "vocabulary, or tokens were added to the policy's alone"
        )
    if limit is not None and limit < length:
        raise ConfigError(
            f"the {name} takes {limit} tokens{_why(model)}, and a prompt with its completion may have {length}: lower "
            "max_prompt_length or max_completion_length"
        )


def _check_tokens(dataset: "Dataset", column: str, known: int, what: str, tokenizer: Any, name: str) -> None:
    for start, values in parts_of(dataset, column):
        flat = values.flatten()
        ids = (flat.cast("int64").fill_null(-1) if flat.null_count else flat).to_numpy(zero_copy_only=False)
        if len(ids) and (wrong_token(ids.min(), column, known) or ids.max() >= known):
            found = ((row, token) for row, own in enumerate(values.to_pylist()) for token in own or ())
            row, token = next(pair for pair in found if wrong_token(pair[1], column, known))
            named = _named(dataset, [start + row])
            raise DataError(_unknown(f"{named} of the {what} data", token, known, tokenizer, name))


def wrong_token(token: int | None, column: str, known: int) -> bool:
    """Whether a column has something else there than a token that the model knows, or of labels the mark of what is not
    trained."""
    return token is None or token >= known or (token < 0 and not (column == LABELS and token == IGNORED))


def _unknown(row: str, token: int | None, known: int, tokenizer: Any, name: str = "model") -> str:
    if token is None or token < 0:
        return f"{row} has {token} among its tokens, which count from 0"
    written = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token)})"
    return (
        f"{row} has token {token}{written}, and the {name} has embeddings for {known} tokens: the tokenizer is not "
        "this model's, or tokens were added to it without model.resize_token_embeddings(len(tokenizer))"
    )


def _check_lengths(dataset: "Dataset", group: tuple[str, ...], limit: int, what: str, takes: str) -> None:
    lengths = _row_lengths(dataset, group)
    found = (lengths > limit).nonzero()[0].tolist()
    if found:
        raise DataError(
            f"{len(found)} rows of the {what} data are longer than the {limit} tokens that the {takes} (up to "
            f"{lengths.max()}; {_named(dataset, found)}): set max_length: {limit}, or max_prompt_length for rollouts"
        )


def _named(dataset: "Dataset", positions: list[int]) -> str:
    """The rows of the user's data, of which some may have been dropped, at these positions of what is left."""
    shown = positions[:SHOWN]
    rows = dataset.select_columns(["row"])[shown]["row"] if "row" in dataset.column_names else shown
    more = "" if len(positions) <= SHOWN else f" and {len(positions) - SHOWN} more"
    return f"row{'s' * (len(positions) > 1)} {', '.join(map(str, rows))}{more}"


def fit_sets(
    model: "Model", limit: int | None, train: Any, evaluated: Any, tokenizer: Any, name: str = "model"
) -> None:
    """`check_fits` of all sets of a run that are no streams, once the model's rotary positions are those of the run's
    longest row. limit: of its tokens, None: what the rows have. evaluated: a set, several by name, or None."""
    from datasets import Dataset

    sets = {"training": train, **(evaluated if isinstance(evaluated, dict) else {"evaluation": evaluated})}
    choose_factors(model, longest_sequence(limit, sets.values()))
    for what, dataset in sets.items():
        if isinstance(dataset, Dataset):
            check_fits(model, dataset, what, tokenizer, name)


def longest_sequence(limit: int | None, sets: Iterable[Any]) -> int:
    """What a sequence of a run may have: `limit` tokens; without one, and of packed rows, those of the longest row or
    document. Streams are not read: their rows beyond what a model takes are refused as they come."""
    from datasets import Dataset

    known = [rows for rows in sets if isinstance(rows, Dataset)]
    if limit is None or any(PACKED in rows.column_names for rows in known):
        return max(map(_longest_row, known), default=0)
    return limit


def _longest_row(dataset: "Dataset") -> int:
    columns = _sequences_of(dataset)
    return max((int(_row_lengths(dataset, group).max(initial=0)) for group in columns), default=0)


def _row_lengths(dataset: "Dataset", group: tuple[str, ...]) -> np.ndarray:
    """The tokens of each row, [rows]; of a packed one those of its longest document."""
    if PACKED in dataset.column_names:
        return np.array([max(own) for _, values in parts_of(dataset, PACKED) for own in values.to_pylist()])
    return sum((lengths_of(dataset, name) for name in group), np.zeros(len(dataset), np.int64))


def lengths_of(dataset: "Dataset", name: str) -> np.ndarray:
    """The tokens of each row of a column of token ids, [rows], without the ids in memory."""
    import pyarrow.compute as pc

    found = [np.zeros(0, np.int64)]
    found += [pc.list_value_length(values).fill_null(0).to_numpy() for _, values in parts_of(dataset, name)]
    return np.concatenate(found)


def longest_of(dataset: "Dataset", name: str) -> int:
    """Tokens of the longest row of a column of token ids."""
    return int(lengths_of(dataset, name).max(initial=0))


def row_check(readers: Collection[Reader], tokenizer: Any = None) -> Callable[[dict[str, Any]], None]:
    """A function that raises what `check_fits` does, for one row of a stream and whoever reads it by then."""

    def check(row: dict[str, Any]) -> None:
        groups = sequences_in(row.keys(), lambda name: _are_tokens(row[name]))
        named = f"row {row['row']}" if "row" in row else "a row"
        longest = max(row.get(PACKED) or (sum(len(row[name]) for name in group) for group in groups))
        read = {name for group in groups for name in group}
        read |= {LABELS} & row.keys() if ("input_ids",) in groups else set()
        for model, limit, known, why in readers:
            for name in read:
                values = row[name]
                if None in values or max(values, default=0) >= known or min(values, default=0) < 0:
                    for token in (token for token in values if wrong_token(token, name, known)):
                        raise DataError(_unknown(f"{named} of the stream", token, known, tokenizer, model))
            if limit is not None and longest > limit:
                raise DataError(
                    f"{named} of the stream has {longest} tokens and the {model} takes {limit}{why}: set max_length: "
                    f"{limit}"
                )

    return check


def known_tokens(model: "Model") -> int:
    """Tokens that a model has embeddings for."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    embeddings: Any = model.get_input_embeddings()
    if isinstance(embeddings, AuxiliaryTrainingWrapper):  # trained in full, or some of their rows
        embeddings = embeddings.original_module
    if isinstance(embeddings, BaseTunerLayer):  # an adapter on them
        embeddings = embeddings.get_base_layer()
    return embeddings.num_embeddings


def parts_of(dataset: "Dataset", name: str) -> Iterator[tuple[int, Any]]:
    """(first row, the column as one Arrow array) of each part of a dataset."""
    plain = dataset.with_format("arrow", columns=[name])
    for start in range(0, len(plain), COUNTED):
        yield start, plain[start : start + COUNTED][name].combine_chunks()


def positions(config: Any) -> int | None:
    """Tokens that a model of this text configuration has positions for; None where they are without limit (states, most
    ALiBi). MPT's ALiBi has one, by another name."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def longest_input(model: "Model") -> int | None:
    """Tokens that a model takes at most, None where its config names no limit, or stretches its rotary positions.

    RoBERTa and its kin count positions from their padding token's id + 1, so they take fewer than they have positions.
    With `BY_BATCH` it is what a row may have so that its neighbours change nothing; with LongRoPE's factors for long
    sequences all of its positions.
    """
    config = model.config.get_text_config()
    limit, rope = positions(config), getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "longrope" and factors_of(model) != LONG:
        return rope["original_max_position_embeddings"]
    if kind not in ("default", *BY_BATCH):
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - module.padding_idx - 1
    return limit


def _why(model: "Model") -> str:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if factors_of(model) == SHORT:
        return " (longrope rotary positions with the factors for short sequences, which the run's lengths take)"
    return f" ({kind} rotary positions: the longest row of a batch changes those of all)" if kind in BY_BATCH else ""
