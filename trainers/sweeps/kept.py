"""Finished points of a sweep and members of an ensemble: what each was trained with, and whether it may be kept."""

import json
from pathlib import Path
from typing import Any

from align.distributed.disk import write_whole
from align.errors import ConfigError
from align.modeling.weights_digest import named_digest
from align.trainers.core.identity import differences, settings_of

# what a run that is resumed may change, and what is finished not
HOW_FAR = ("max_steps", "num_train_epochs")
OF_THE_BEST = (
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps",
    "save_strategy", "save_steps",
)  # fmt: skip
AGAIN = "delete it to train it again"


def start_identity(model: str | None) -> dict[str, str | None]:
    """Of the model that all start from, without loading it: its name, and the weights that lie in a folder."""
    return {"model": model, "weights": None if model is None else named_digest(model)}


def result_settings(args: Any, **identity: Any) -> dict[str, Any]:
    """The options that decide what a finished run's result is, and what else does, as JSON holds them."""
    names = HOW_FAR + (OF_THE_BEST if args.load_best_model_at_end else ())
    options = {**settings_of(args), **{name: getattr(args, name) for name in names}}
    return json.loads(json.dumps({**options, **identity}, default=str))


def described(config: Any) -> dict | None:
    """A LoRA or quantisation config as a dict whose sets are sorted, for comparison."""
    if config is None:
        return None
    content = config if isinstance(config, dict) else config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}


def write_record(path: Path, done: dict) -> None:
    """done: with the settings under `settings`."""
    write_whole(path, [json.dumps(done, indent=2) + "\n"])


def finished(record: Path, settings: dict) -> dict:
    """The record of what is finished. ConfigError without one, for a damaged one, and for one of other settings."""
    folder = record.parent
    if not record.exists():
        raise ConfigError(f"{folder} is finished, and has no {record.name} to say with which settings: {AGAIN}")
    try:
        done = json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{record} is damaged ({error}), which says how {folder} was trained: {AGAIN}") from error
    if not isinstance(done, dict) or not isinstance(done.get("settings"), dict):
        raise ConfigError(f"{record} says nothing of its settings, and so of how {folder} was trained: {AGAIN}")
    before = done["settings"]
    differ = differences(before, settings)
    shown = [f"{key} {_shown(before, key, a)} before and {b!r:.40} now" for key, (a, b) in differ.items()]
    if shown:
        raise ConfigError(
            f"{folder} was trained with other settings ({', '.join(shown)}): delete it, or use another output_dir, to "
            "train it again"
        )
    return done


def _shown(before: dict, key: str, value: Any) -> str:
    """Of an older version's record, which lacks what is compared now."""
    return f"{value!r:.40}" if key.split(".")[0] in before else "not recorded"
