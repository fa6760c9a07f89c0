"""Which files of a folder are which split, as its dataset card, its folders and its file names say."""

import gzip
import logging
import re
import zlib
from collections.abc import Collection
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
    found = sorted(file for file in path.rglob("*") if suffix_of(file) in BUILDERS and _visible(file, path))
    if not found:
        raise DataError(f"the folder {path} holds no {READABLE} file.")
    configs = {name: splits for name, splits in _configs(path).items() if any(splits.values())}
    if configs:
        return _chosen(configs, config, path)
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


def _chosen(configs: dict[str, Splits], config: str | None, path: Path) -> Splits:
    names = ", ".join(configs)
    if config is not None and config not in configs:
        raise DataError(f"{path} has no configuration {config!r}; its README.md names {names}.")
    if config is None and len(configs) > 1 and "default" not in configs:
        raise DataError(
            f"{path} has several configurations, choose one with dataset_config, or name its folder: {names}."
        )
    splits = configs[config or ("default" if "default" in configs else next(iter(configs)))]
    return {split: files for split, files in splits.items() if files}


def _configs(folder: Path) -> dict[str, Splits]:
    """The files of each split of each configuration that the card of a hub dataset names in its YAML; {} without. The
    one that the card marks as the default has the name `default` too."""
    import yaml

    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", text, re.DOTALL)
    try:
        entries = (yaml.safe_load(header[1]) or {}).get("configs") if header else None
    except (yaml.YAMLError, AttributeError):
        logger.warning("%s cannot be read as a dataset card: splits follow from file names", card)
        return {}
    configs: dict[str, Splits] = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and (splits := _splits_of(entry, folder)):
            configs[str(entry.get("config_name", "default"))] = splits
            if entry.get("default"):
                configs["default"] = splits
    return configs


def _splits_of(entry: dict[str, Any], folder: Path) -> Splits:
    place = folder / str(entry.get("data_dir") or ".")
    given = entry.get("data_files")
    if given is None:
        found = sorted(file for file in place.rglob("*") if suffix_of(file) in BUILDERS and _visible(file, folder))
        return _by_names(found, place) if found and "data_dir" in entry else {}
    if isinstance(given, dict):
        given = [{"split": split, "path": paths} for split, paths in given.items()]
    parts = given if isinstance(given, list) else [given]
    if not all(isinstance(part, dict) for part in parts):
        return _by_names(files, place) if (files := _matching(parts, place, folder)) else {}
    return {str(part.get("split", "train")): _matching(part.get("path"), place, folder) for part in parts}


def _matching(patterns: Any, place: Path, folder: Path) -> list[Path]:
    each: Collection[Any] = patterns if isinstance(patterns, list) else [patterns]
    found: set[Path] = set()
    for pattern in (str(one or "").removeprefix("./").lstrip("/") for one in each):
        if pattern and "://" not in pattern:  # files elsewhere are not here
            found |= {*place.glob(f"{pattern}/*" if pattern.endswith("**") else pattern)}
    return sorted(file for file in found if suffix_of(file) in BUILDERS and _visible(file, folder))
