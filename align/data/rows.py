"""Loading rows from a local file or folder, a saved dataset, or the hub. What is local never needs the network."""

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.cache import room_in
from align.data.csv_cells import csv_options
from align.data.files import BUILDERS, DAMAGED, SPLIT_WORDS, files_by_split, opened, suffix_of
from align.data.fingerprint import file_digest, text_digest
from align.data.hub import not_found, offline_if_unreachable
from align.data.json_lines import are_lines, broken_array, check_lines, faulty_line
from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def load_rows(
    dataset_name: str | Path,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    texts: Collection[str] = (),
) -> "Dataset":
    """The rows of one split.

    dataset_name: a .parquet, .jsonl, .json, .jsonl.gz or .csv file; a folder of such files; a folder written by
    `datasets.save_to_disk`; or the name of a dataset on the hub. split: also `datasets`' slices, "train[:1000]".
    config: the configuration of a hub dataset (its "subset"), or of a copy with its README.md. streaming: a
    `datasets.IterableDataset`, whose rows are read when they are asked for; it takes no slices. texts: further columns
    of CSV files that stay text whatever they look like, such as `42`, beside those that all trainers read as text.

    A single file, and a folder whose file names tell no split, is the split "train". Raises DataError when there is no
    such file, split or configuration, or when a file cannot be read (with the line, for .jsonl).
    """
    name = str(dataset_name)
    if not name.strip():
        raise DataError("the name of the dataset is empty: name a file, a folder or a dataset of the hub")
    path = Path(name).expanduser()
    if not path.exists():
        if _looks_local(name):
            raise DataError(f"there is no file or folder {name!r}.{_nearest(path)}")
        with room_in(None, f"the rows of {name}"):
            return _load_hub(name, split, config, streaming)
    if streaming and "[" in split:
        raise DataError(f"{name}: split {split!r} is a slice, which a stream has none of: name the split alone")
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        if config is not None:
            raise DataError(f"{name} is a saved dataset, so config {config!r} has no meaning.")
        dataset = _load_saved(path, split)
        if streaming:
            dataset = dataset.to_iterable_dataset()
    else:
        with room_in(None, f"the rows of {name}"):
            dataset = _load_files(path, split, config, streaming, texts)
    dataset.info.dataset_name = _named(name, split)
    return dataset


def source_of(dataset: "Dataset", source: str = "") -> str:
    """What to call a dataset in messages: what the caller says, else where it was loaded from."""
    return source or dataset.info.dataset_name or "dataset"


# ---- local files ----------------------------------------------------------------------------------------------------


def _load_files(path: Path, split: str, config: str | None, streaming: bool, texts: Collection[str]) -> "Dataset":
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetsError

    files = files_by_split(path, config)
    for wanted in _split_names(split):
        if wanted not in files:
            raise DataError(f"{path} has no split {wanted!r}; it has: {', '.join(sorted(files))}.{_split_hint(path)}")
    files = {name: files[name] for name in _split_names(split)}
    every = [file for group in files.values() for file in group]
    kinds = {BUILDERS[suffix_of(file)] for file in every}
    if len(kinds) > 1:
        raise DataError(f"{path} mixes file types in split {split!r}: {', '.join(file.name for file in every)}.")
    for file in every:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty (0 bytes).")
    kind = kinds.pop()
    options: dict[str, Any] = {
        "path": kind,
        # The cache of `datasets` knows a file by its path and its time, which survive a rewrite now and then.
        "name": "stream" if streaming else text_digest([file_digest(file) for file in every]),
        "data_files": {name: [str(file.resolve()) for file in group] for name, group in files.items()},
    }
    try:
        lines = [file for file in every if are_lines(file)] if kind == "json" and not streaming else []
        if kind == "csv":
            options |= csv_options(every, texts, streaming)
        if lines and not Path(load_dataset_builder(**options).cache_dir).exists():  # else it has been read before
            check_lines(lines)
        dataset = load_dataset(**options, split=split, streaming=streaming)
        if streaming and kind == "json" and dataset.features is not None:
            # the beginning's types stay: else those of a later line change the texts around it (`check_lines`)
            options |= {"features": dataset.features, "on_mixed_types": None}
            dataset = load_dataset(**options, split=split, streaming=True)
        if not streaming:
            dataset.data.validate(full=True)  # else text that is not UTF-8 fails in the middle of training
    except DataError:
        raise
    except DAMAGED as error:
        names = ", ".join(str(file) for file in every)
        raise DataError(f"{names}: cut off or damaged ({_first_line(error)}); download it again") from error
    except (DatasetsError, ValueError) as error:
        raise DataError(_unreadable(every, error)) from error
    return dataset


def _split_names(split: str) -> list[str]:
    """The split names in an instruction of `datasets`, such as "train[:10%]+test"."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def evaluation_split(dataset_name: str | Path, split: str) -> str:
    """The split to read of data that are named to be evaluated on: all of a file, whatever it is called, unless `split`
    is a slice."""
    return "train" if Path(dataset_name).expanduser().is_file() and split in SPLIT_WORDS else split


def _split_hint(path: Path) -> str:
    if path.is_file():
        return (
            " A file is one split: evaluate on another file (eval_dataset_name), on a part of this one "
            "(dataset_train_split: 'train[:90%]', dataset_test_split: 'train[90%:]'), or not (eval_strategy: 'no')."
        )
    return " Splits come from file names such as train.jsonl and test.jsonl."


def _unreadable(files: list[Path], error: BaseException) -> str:
    """What is wrong in which file: for JSON the line that is broken."""
    for file in files:
        if BUILDERS[suffix_of(file)] == "json":
            with opened(file) as lines:
                is_array = lines.read(1024).lstrip().startswith(b"[")
            fault = broken_array(file) if is_array else faulty_line([file])
            if fault:
                return fault
        elif file.suffix.lower() == ".csv" and (separator := _other_separator(file)) is not None:
            return f"{file} is separated by {separator}, and a .csv file here by commas: export it with commas"
    while error.__cause__ is not None:
        error = error.__cause__
    names = ", ".join(str(file) for file in files)
    return f"{names} cannot be read as {files[0].suffix}: {_first_line(error)}"


def _other_separator(file: Path) -> str | None:
    """What separates the columns of a header without commas, as spreadsheets of many countries write it; None: none."""
    with file.open(encoding="utf-8-sig", errors="replace") as opened:
        header = opened.readline()
    found = {"semicolons": ";", "tabs": "\t"}
    return None if "," in header else next((name for name, sign in found.items() if sign in header), None)


# ---- saved datasets and the hub -------------------------------------------------------------------------------------


def _load_saved(path: Path, split: str) -> "Dataset":
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} looks like a saved dataset but cannot be read: {_first_line(error)}") from error
    if not isinstance(saved, DatasetDict):
        if split not in ("train", str(saved.split)):
            raise DataError(f"{path} is one saved split ({saved.split or 'train'}); there is no split {split!r}.")
        return saved
    if split not in saved:
        raise DataError(
            f"{path} has no split {split!r}; it has: {', '.join(saved)}. Slices are not read from saved datasets."
        )
    return saved[split]


def _load_hub(name: str, split: str, config: str | None, streaming: bool) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with offline_if_unreachable(name) as problem:
            dataset = load_dataset(name, config, split=split, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        if problem:
            raise DataError(f"dataset {name!r}: {not_found(name, problem)}.{_nearest(Path(name))}") from error
        what = f"dataset {name!r}" + (f", config {config!r}" if config else "") + f", split {split!r}"
        raise DataError(
            f"{what}: no such file or folder here.{_nearest(Path(name))} The hub answers: {_first_line(error)}"
        ) from error
    dataset.info.dataset_name = _named(name, split)
    return dataset


def _named(name: str, split: str) -> str:
    """Where rows come from, for messages and model cards: row numbers count within the split, so it is named."""
    return name if split == "train" else f"{name} ({split})"


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist can only mean a file: hub names are `name` or `owner/name`."""
    return (
        suffix_of(Path(name)) in BUILDERS
        or name.startswith(("/", "./", "../", "~", "."))
        or name.count("/") > 1
        or name.endswith("/")
        or "\\" in name
    )


def _nearest(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        path, folder = folder, folder.parent
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1, cutoff=0.5)
    where = f" The folder {folder.resolve()}"
    if near:
        return f"{where} has {near[0]!r}."
    return f"{where} has nothing named like {path.name!r}."


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
