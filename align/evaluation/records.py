"""The evaluation file of a run, `<run>/overoptimization.jsonl`: written while it trains, read back for its curves.

The first line is a header, every further line one evaluation on one fixed set of prompts:

    {"format": "align.overoptimization/2", "name", "method", "proxy", "gold", "seed", "started", "config", "crc32"}
    {"step", "kl", "kl_k3", "proxy", "gold", "length", ..., "per_prompt": {...}, "samples": [...], "crc32"}

KL is in nats per sequence (sum over response tokens). `rewards/<name>` is each reward that the run knows, also one that
it does not optimise; `proxy` is their weighted sum. A line counts when it is whole: a process killed while it writes
leaves at most one partial last line, which reading drops with a warning and resuming cuts off. `crc32` is of the line's
other keys as `json.dumps(..., ensure_ascii=False)` writes them: a changed digit is seen. Files of format 1 have none.
"""

import json
import logging
import math
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from align.distributed.disk import write_whole, writing
from align.errors import ConfigError, DataError, TrainingError
from align.evaluation.answers import is_message

logger = logging.getLogger(__name__)

FORMAT = "align.overoptimization/2"
UNCHECKED = "align.overoptimization/1"
CHECKSUM = b', "crc32": '
FILE_NAME = "overoptimization.jsonl"
HEADER_KEYS = ("format", "name", "method", "proxy", "gold", "seed", "started", "config")
SCORE_KEYS = ("kl", "kl_k3", "proxy", "gold", "length")
ROUNDED = 1e-3  # of the largest number per prompt: a program that writes few digits has such means
SAMPLE_KEYS = ("prompt", "completion", "proxy", "gold")


class NoEvaluation(DataError):
    """A run has no evaluation file, or one with a header alone: nothing is evaluated yet, or its method does not."""


@dataclass
class Run:
    """One run's evaluations. E evaluations of the same P prompts, in order of step.

    step: int [E]. kl, kl_k3 (nats per sequence), proxy, length (tokens): float [E], means over the prompts.
    gold: float [E], or None for a run without a gold reward. extras: further float [E] arrays, NaN where not recorded.
    per_prompt: float [E, P] arrays under the same names. samples: per evaluation, the recorded completions.
    """

    name: str
    method: str
    proxy_name: str
    gold_name: str | None
    seed: int
    started: str
    config: dict
    step: np.ndarray
    kl: np.ndarray
    kl_k3: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray | None
    length: np.ndarray
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    per_prompt: dict[str, np.ndarray] = field(default_factory=dict)
    samples: list[list[dict]] = field(default_factory=list)
    reward_order: list[str] = field(default_factory=list)  # "rewards/<name>" keys as the run has them
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.step)


class EvalWriter:
    """Append evaluations to `<run_dir>/overoptimization.jsonl`. Make one in the main process only.

    resume_step: None starts a new file (an old one is kept beside it under another name); a step keeps the records up
    to and including that step and drops later ones, which belong to training that will be repeated. `last_step` is the
    step of the newest record kept, so that a trainer knows whether the evaluation at its checkpoint is already there.
    evaluated: the `last_step` that the run had at its checkpoint: a file that has lost it is refused. None: not known.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        name: str,
        method: str,
        proxy: str,
        gold: str | None,
        seed: int,
        config: dict,
        resume_step: int | None = None,
        evaluated: int | None = None,
    ):
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.header = {
            "format": FORMAT,
            "name": name,
            "method": method,
            "proxy": proxy,
            "gold": gold,
            "seed": seed,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config,
        }
        self.last_step: int | None = None
        self._num_prompts: int | None = None
        lines = [_dump(self.header, self.path)]
        if resume_step is not None:
            lines = self._kept_lines(resume_step, evaluated)
        elif self.path.exists():
            set_aside(self.path)
        write_whole(self.path, lines)

    def _kept_lines(self, resume_step: int, evaluated: int | None) -> list[str]:
        if not self.path.exists():
            logger.warning("resuming at step %d, but %s does not exist: its curve starts here", resume_step, self.path)
            self.header["starts_after"] = resume_step
            return [_dump(self.header, self.path)]
        header, *records = _read_lines(self.path)
        for key in ("name", "method", "proxy", "gold"):
            if header[key] != self.header[key]:
                raise ConfigError(
                    f"{self.path} is of a run with {key} {header[key]!r}, and this one has {self.header[key]!r}: "
                    "one curve cannot hold both. Resume with the same setting, or use another output folder"
                )
        self.header = header | {"format": FORMAT}
        kept = [record for record in records if record["step"] <= resume_step]
        newest = kept[-1]["step"] if kept else header.get("starts_after", -1)
        if evaluated is not None and newest < evaluated:
            raise DataError(
                f"{self.path} has lost evaluations that the run made before its checkpoint at step {resume_step}, the "
                f"last of them at step {evaluated}: restore the file, or move it away, and the curve starts anew"
            )
        if len(kept) < len(records):
            dropped = [record["step"] for record in records[len(kept) :]]
            logger.info("%s: dropped the evaluations after step %d (steps %s)", self.path, resume_step, dropped)
        if kept:
            self.last_step = kept[-1]["step"]
            self._num_prompts = len(kept[-1]["per_prompt"]["kl"])
        return [_dump(line, self.path) for line in (self.header, *kept)]

    def write(self, step: int, *, kl, kl_k3, proxy, gold=None, length, samples: list[dict] | None = None, **extra):
        """Append the evaluation after `step` optimiser steps.

        kl, kl_k3, proxy, gold, length and extra: one number per prompt (a list or an array [P], the same P prompts at
        every evaluation); the means are computed here. length and extra may also be single numbers.
        samples: dicts with prompt, completion, proxy and gold. Raises TrainingError on a number that is not finite.
        """
        step = int(step)
        if self.last_step is not None and step <= self.last_step:
            raise TrainingError(f"{self.path} already has step {self.last_step}: cannot append step {step}")
        if (gold is None) != (self.header["gold"] is None):
            raise TrainingError(
                f"step {step}: the run's gold reward is {self.header['gold']!r}, and the evaluation "
                f"{'lacks' if gold is None else 'has'} gold scores"
            )
        record: dict = {"step": step}
        per_prompt = {}
        num_prompts = self._num_prompts
        values = {"kl": kl, "kl_k3": kl_k3, "proxy": proxy, "gold": gold, "length": length, **extra}
        for key, value in values.items():
            if key in ("step", "per_prompt", "samples"):
                raise TrainingError(f"an evaluation's own key {key!r} cannot be a metric")
            if value is None and key == "gold":
                record[key] = None
                continue
            array = np.asarray(value, dtype=np.float64)
            bad = np.flatnonzero(~np.isfinite(array))
            if bad.size:
                raise TrainingError(
                    f"step {step}: {key} is not finite for prompts {bad[:10].tolist()} "
                    f"({bad.size} of {array.size}; first value {array.flat[bad[0]]})"
                )
            if array.ndim == 0 and key not in ("kl", "kl_k3", "proxy", "gold"):
                record[key] = float(array)
                continue
            if array.ndim != 1 or array.size == 0 or array.size != (num_prompts or array.size):
                raise TrainingError(
                    f"step {step}: {key} has shape {array.shape}; the evaluations of a run have one number per prompt, "
                    f"for the same {num_prompts or 'P'} prompts"
                )
            num_prompts = array.size
            record[key] = float(array.mean())
            # 8 significant digits are more than float32 holds, in half the bytes.
            per_prompt[key] = [float(f"{x:.8g}") for x in array.tolist()]
        record["per_prompt"] = per_prompt
        record["samples"] = [{key: sample.get(key) for key in SAMPLE_KEYS} for sample in samples or []]
        data = _dump(record, self.path).encode()
        with writing(self.path), open(self.path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.last_step, self._num_prompts = step, num_prompts


def read_run(path: str | Path) -> Run:
    """Read the evaluation file of a run (the file, or the run's folder). Raises DataError naming the file and line."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.exists():
        raise NoEvaluation(f"{path} does not exist: give a run's folder, or its {FILE_NAME}")
    lines = _read_lines(path)
    header, records = next(lines), []
    for number, record in enumerate(lines, start=2):  # as arrays at once: lists of numbers take four times their memory
        where = f"{path}: line {number}"
        record["per_prompt"] = {key: _array(v, key, where) for key, v in record["per_prompt"].items()}
        _check_means(record, where)
        records.append(record)
    if not records:
        raise NoEvaluation(f"{path} holds no evaluation yet (only its header)")

    def column(key: str) -> np.ndarray:
        return np.array([math.nan if r.get(key) is None else r[key] for r in records], dtype=np.float64)

    known = {"step", "per_prompt", "samples", *SCORE_KEYS}
    extra_keys = sorted({key for record in records for key in record} - known)
    shared = set.intersection(*(set(record["per_prompt"]) for record in records))
    reward_order = [key for key in records[0]["per_prompt"] if key.startswith("rewards/")]
    return Run(
        name=header["name"],
        method=header["method"],
        proxy_name=header["proxy"],
        gold_name=header["gold"],
        seed=header["seed"],
        started=header["started"],
        config=header["config"],
        step=np.array([record["step"] for record in records], dtype=np.int64),
        kl=column("kl"),
        kl_k3=column("kl_k3"),
        proxy=column("proxy"),
        gold=None if header["gold"] is None else column("gold"),
        length=column("length"),
        extras={key: column(key) for key in extra_keys},
        per_prompt={key: np.stack([r["per_prompt"].pop(key) for r in records]) for key in sorted(shared)},
        samples=[record["samples"] for record in records],
        reward_order=reward_order,
        path=path,
    )


def _read_lines(path: Path) -> Iterator[dict]:
    """The header of a file and its records, checked; a partial last line is dropped with a warning."""
    header, previous = None, None
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}: line {number}"
            if not line.endswith(b"\n"):  # the start of a line that was never finished
                logger.warning("%s is incomplete (a process was killed while writing it): dropped", where)
                break
            entry = _parsed(line, where)
            if header is None and entry.get("format") not in (FORMAT, UNCHECKED):
                found = entry.get("format")
                raise DataError(f"{where} is not the header of an evaluation file (format {FORMAT!r}, found {found!r})")
            if (header or entry)["format"] == FORMAT and not _as_written(line, entry):
                raise DataError(f"{where} is not as it was written (its crc32 is another): restore the file")
            if header is None:
                header = entry
                _check_header(header, path)
            else:
                _check_record(entry, header, previous, where)
                previous = entry
            yield entry
    if header is None:
        raise DataError(f"{path}: line 1 is not the header of an evaluation file (format {FORMAT!r}, found None)")


def _parsed(line: bytes, where: str) -> dict:
    try:
        value = json.loads(line.decode(), parse_constant=_refuse_constant)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}): the file is damaged there") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a JSON object")
    return value


def _as_written(line: bytes, entry: dict) -> bool:
    """Whether the checksum, which is taken out of the entry, is that of the other keys."""
    expected = entry.pop("crc32", None)
    text = line.rpartition(CHECKSUM)[0] + b"}"  # as `_dump` puts it; another text may say the same
    return expected == zlib.crc32(text) or expected == _crc32(entry)


def _check_header(header: dict, path: Path) -> None:
    missing = [key for key in HEADER_KEYS if key not in header]
    if missing:
        raise DataError(f"{path}: the header (line 1) lacks {', '.join(missing)}")
    for key in ("name", "method", "proxy", "gold"):
        if not isinstance(header[key], str) and (key != "gold" or header[key] is not None):
            raise DataError(f"{path}: {key} of the header (line 1) is {header[key]!r:.80}, no text")
    if not isinstance(header["config"], dict):
        raise DataError(f"{path}: config of the header (line 1) is no object of settings by name")


def _array(values: list, key: str, where: str) -> np.ndarray:
    kinds = {type(x) for x in values}
    try:
        array = np.array(values, dtype=np.float64) if kinds <= {int, float} else np.array([np.nan])
    except OverflowError:  # a whole number of hundreds of digits
        array = np.array([np.inf])
    if not np.isfinite(array).all():
        raise DataError(f"{where}: {key} of per_prompt holds something that is no finite number")
    return array


def _check_means(record: dict, where: str) -> None:
    """DataError where a mean is not that of its numbers per prompt."""
    for key, values in record["per_prompt"].items():
        mean, stated = float((values / values.size).sum()), record.get(key)
        if stated is not None and abs(stated - mean) > ROUNDED * np.abs(values).max():
            raise DataError(f"{where}: {key} is {stated:.6g}, and its numbers per prompt have the mean {mean:.6g}")


def _check_record(record: dict, header: dict, previous: dict | None, where: str) -> None:
    missing = [key for key in ("step", *SCORE_KEYS, "per_prompt", "samples") if key not in record]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}")
    _check_kinds(record, where)
    needed = ["kl", "kl_k3", "proxy"] + (["gold"] if header["gold"] is not None else [])
    empty = [key for key in needed if record[key] is None or key not in record["per_prompt"]]
    if empty:
        raise DataError(f"{where} has no {', '.join(empty)}, or not per prompt")
    lengths = {key: len(values) for key, values in record["per_prompt"].items()}
    if previous is not None:
        if record["step"] <= previous["step"]:
            raise DataError(f"{where} has step {record['step']} after step {previous['step']}: steps must increase")
        lengths["the line before"] = len(previous["per_prompt"]["kl"])
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where} has different numbers of prompts: {lengths}")
    if not any(lengths.values()):
        raise DataError(f"{where} has no prompt: its lists per prompt are empty")


def _check_kinds(record: dict, where: str) -> None:
    if type(record["step"]) is not int or not -(2**63) <= record["step"] < 2**63:
        raise DataError(f"{where}: step is {record['step']!r:.80}, no whole number")
    for key in record.keys() - {"step", "per_prompt", "samples"}:
        value = record[key]
        if value is not None and not _is_finite(value):
            raise DataError(f"{where}: {key} is {value!r:.80}, no finite number")
    per_prompt, samples = record["per_prompt"], record["samples"]
    if not isinstance(per_prompt, dict) or not all(isinstance(values, list) for values in per_prompt.values()):
        raise DataError(f"{where}: per_prompt must hold a list of numbers by name")
    if not isinstance(samples, list):
        raise DataError(f"{where}: samples must be a list")
    for number, sample in enumerate(samples):
        for key in ("prompt", "completion"):
            value = sample.get(key) if isinstance(sample, dict) else None
            if not isinstance(value, str) and not (isinstance(value, list) and value and all(map(is_message, value))):
                raise DataError(f"{where}: sample {number} has no {key}: a text, or messages with role and content")
        for key in ("proxy", "gold"):
            if sample.get(key) is not None and not _is_finite(sample[key]):
                raise DataError(f"{where}: {key} of sample {number} is {sample[key]!r:.80}, no finite number")


def _is_finite(value) -> bool:
    """Whether this is a number that float64 holds; JSON's whole numbers have no end."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a finite number")


def _crc32(value: dict) -> int:
    # a surrogate, which is half of a character, is a text that JSON can hold and UTF-8 cannot
    return zlib.crc32(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _dump(value: dict, path: Path) -> str:
    try:
        return json.dumps(value | {"crc32": _crc32(value)}, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise TrainingError(f"cannot write to {path}: {error}; give plain finite numbers, strings, lists") from error


def set_aside(path: Path, why: str = "is of an earlier run") -> None:
    """Keep a file of results under another name, curve.jsonl as curve.1.old.jsonl, and say so."""
    number = 1
    while (old := path.with_name(f"{path.stem}.{number}.old{path.suffix}")).exists():
        number += 1
    os.replace(path, old)
    logger.warning("%s %s: kept as %s", path, why, old.name)
