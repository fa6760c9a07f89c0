"""Which files of a folder are which split, as its dataset card, its folders and its file names say."""

import gzip
import logging
import re
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from align.errors import DataError

logger = logging.getLogger(__name__)

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
READABLE = f"{', '.join(BUILDERS)}, .jsonl.gz"
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)
"""What a compressed file raises of which a part is missing."""
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")

# The words in a file or folder name that tell its split; the same as those of `datasets`.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")


def suffix_of(path: Path) -> str:
    """The suffix in small letters; `.jsonl` of a `.jsonl.gz` file, which is read as it is."""
    first, second = ("", "", *(suffix.lower() for suffix in path.suffixes))[-2:]
    return first if second == ".gz" and BUILDERS.get(first) == "json" else second


def _stem(path: Path) -> str:
    """The name without `.jsonl` or `.jsonl.gz`."""
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def opened(file: Path) -> BinaryIO:
    """The bytes of a file, of a `.gz` one those that it holds."""
    return cast(BinaryIO, gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb"))


def files_by_split(path: Path, config: str | None = None) -> dict[str, list[Path]]:
    """The files of each split of a file, or of a folder; of one with a dataset card, of one configuration."""
    if path.is_file():
        if config is not None:
            raise DataError(f"{path} is a file, so config {config!r} has no meaning.")
        if suffix_of(path) not in BUILDERS:
            raise DataError(f"{path} has the suffix {path.suffix!r}; readable are {READABLE}.")
        # "train" is the default split, so it means the file itself whatever the file is called.
        return {"train": [path]} | {split_in(_stem(path)) or "train": [path]}
    found = _data_files(path.rglob("*"), path)
    if not found:
        raise DataError(f"the folder {path} holds no {READABLE} file.")
    splits = _of_the_card(_configs(path), config, path)
    if splits is not None:
        return splits
    if config is not None:
        raise DataError(
            f"{path} has no README.md that says what the configurations of its files are, so config {config!r} has no "
            "meaning; name the file or folder itself."
        )
    return _by_names(found, path)


def _by_names(found: list[Path], path: Path) -> dict[str, list[Path]]:
    """The files of each split, as the words in file and folder names tell it."""
    named: dict[str, list[Path]] = {}
    for file in found:
        words = [_stem(file), *reversed(file.relative_to(path).parts[:-1])]
        split = _shard_of(file, path) or next(filter(None, map(split_in, words)), None)
        if split:
            named.setdefault(split, []).append(file)
    for split, files in (named or {"train": found}).items():
        _refuse_several_sets(split, files, path)
    ignored = [file.name for file in found if not any(file in group for group in named.values())]
    if named and ignored:
        logger.warning("%s: %s not read, their names tell no split", path, ", ".join(ignored))
    return named or {"train": found}


def _shard_of(file: Path, folder: Path) -> str | None:
    """The split of a file that the hub has written: in `train_sft-00000-of-00002` it is `train_sft`, beside which there
    may be `train_prefs` with other copies of the same rows. In the folder `data` any name is a split's."""
    found = SHARD.fullmatch(_stem(file))
    if found is None or (split_in(found[1]) is None and file.parent != folder / "data"):
        return None
    return next((split for split, known in SPLIT_WORDS.items() if found[1] in known), found[1])


def _refuse_several_sets(split: str, files: list[Path], path: Path) -> None:
    """DataError where two folders hold what is the first part of a whole set, as the hub names it: these are several
    configurations, often the same rows in another form."""
    first = [file for file in files if _begins(file)]
    folders = sorted({str(file.parent.relative_to(path)) for file in first})
    if len(folders) > 1:
        raise DataError(
            f"{path}: split {split!r} would be of several sets, in {', '.join(folders)}: name one of these folders, or "
            "keep the README.md of the hub beside them, whose configurations dataset_config names"
        )


def _begins(file: Path) -> bool:
    """Whether it is named as the first file of a split: `train-00000-of-00002`, or, as in the hub's own conversions,
    `0000.parquet` in the folder `train`."""
    if _stem(file) == "0000":
        return split_in(file.parent.name) is not None
    return re.fullmatch(r"\w+-0{5}-of-\d{5}(-[0-9a-f]+)?", _stem(file)) is not None


def _visible(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    return not hidden and file.name not in NO_ROWS


def split_in(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in SPLIT_WORDS.items() if any(word in known for word in words)), None)


# ---- the dataset card -----------------------------------------------------------------------------------------------

Splits = dict[str, list[Path]]


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations that the card of a hub dataset names in its YAML; {} without."""
    import yaml
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        entries = (metadata_load(card) or {}).get("configs") if card.is_file() else None
    except (yaml.YAMLError, ValueError):
        logger.warning("%s cannot be read as a dataset card: splits follow from file names", card)
        return {}
    entries = entries if isinstance(entries, list) else []
    return {str(entry.get("config_name", "default")): entry for entry in entries if isinstance(entry, dict)}


def _of_the_card(configs: dict[str, dict[str, Any]], config: str | None, path: Path) -> Splits | None:
    """The files of one configuration by split; None where the card names none that is here."""
    from datasets.utils.metadata import MetadataConfigs

    here = {name: splits for name, entry in configs.items() if (splits := _splits_of(entry, path, name))}
    if not here:
        return None
    names = ", ".join(here)
    if config is not None and config not in here:
        raise DataError(f"{path} has no configuration {config!r}; its README.md names {names}.")
    try:
        chosen = config or MetadataConfigs({name: configs[name] for name in here}).get_default_config_name()
    except ValueError as error:
        raise DataError(f"{path}/README.md: {error} Choose one with dataset_config.") from error
    if chosen is None:
        raise DataError(
            f"{path} has several configurations, choose one with dataset_config, or name its folder: {names}."
        )
    return here[chosen]


def _splits_of(entry: dict[str, Any], folder: Path, name: str) -> Splits:
    """As the hub reads an entry, apart from files that lie elsewhere or are not there."""
    from datasets.data_files import resolve_pattern, sanitize_patterns

    place = folder / str(entry.get("data_dir") or ".")
    if entry.get("data_files") is None:
        found = _data_files(place.rglob("*"), folder) if "data_dir" in entry else []
        return _by_names(found, place) if found else {}
    try:
        patterns = sanitize_patterns(entry["data_files"])
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder}/README.md, configuration {name!r}: {error}") from error
    splits: Splits = {}
    for split, paths in patterns.items():
        for pattern in (str(one or "") for one in paths):
            if pattern and "://" not in pattern:
                with suppress(FileNotFoundError):
                    splits.setdefault(split, []).extend(map(Path, resolve_pattern(pattern, str(place))))
    return {split: files for split, paths in splits.items() if (files := _data_files(paths, folder))}


def _data_files(paths: Iterable[Path], folder: Path) -> list[Path]:
    return sorted({file for file in paths if suffix_of(file) in BUILDERS and _visible(file, folder)})
