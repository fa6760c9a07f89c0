"""Which run a checkpoint belongs to: the method, the model, the data and every setting that changes the result.

It is written to each checkpoint as `align_run.json` and compared before a run resumes from it.
"""

import inspect
import json
from contextlib import suppress
from dataclasses import fields
from datetime import date
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

from datasets import Dataset
from torch import nn

from align.config.arguments import instead_of, resume_from
from align.data.endless import EndlessRows
from align.data.fingerprint import rows_digest
from align.data.streams import LOOKED_AT
from align.errors import TrainingError
from align.modeling.adapter_names import NOT_OF_ADAPTER
from align.modeling.fingerprint import mark

FILE_NAME = "align_run.json"

# Settings that a resumed run may change: they say how long it trains, where something is kept or shown, when it is
# evaluated, and in what portions or with what memory the same result is computed.
CHANGEABLE_PREFIXES = (
    "eval_", "logging_", "save_", "hub_", "push_to_hub", "dataloader_", "num_logged_", "precompute_ref_",
    "include_", "log_", "fsdp", "deepspeed", "ddp_", "torch_compile", "torch_empty_cache", "trackio", "batch_eval_",
    "disable_tqdm", "report_to", "verify_saved", "gradient_checkpointing", "activation_checkpointing",
    "auto_find_batch_size", "metric_for", "greater_is_better", "load_best", "resume_", "restore_callback",
    "skip_memory", "project", "past_index",
)  # fmt: skip
CHANGEABLE = {
    "output_dir", "run_name", "num_train_epochs", "max_steps", "do_train", "do_eval", "do_predict", "use_cpu",
    "local_rank", "debug", "average_tokens_across_devices", "accelerator_config", "parallelism_config", "ray_scope",
    "ignore_data_skip", "full_determinism", "remove_unused_columns", "max_bad_share", "num_eval_prompts",
    "rollout", "batching", "tokens_per_batch", "forward_tokens_per_batch", "chunk_size",
    "num_generations_eval", "steps_per_generation", "generation_batch_size",  # the latter two are num_mini_batches
    "margin_cache_dir", "ref_log_probs_dir", "use_liger_kernel", "prediction_loss_only", "label_names",
    "enable_jit_checkpoint", "stop_at",
    "trust_remote_code", "pad_token", "pad_to_multiple_of", "activation_offloading", "padding_free",
    "eos_token", "chat_template_path", "num_completions_to_print", "max_new_tokens",
    "length_column_name", "dataset_num_proc", "model_init_kwargs",
    "per_device_train_batch_size", "gradient_accumulation_steps",  # compared as their product
}  # fmt: skip
CACHED_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # of the reference, which is checked by itself
LIBRARIES = ("align", "transformers", "trl", "torch", "builtins")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "rows_per_step")


def settings_of(args) -> dict[str, Any]:
    """The settings that change the result, as JSON holds them; the three of the batch as rows per optimiser step, and
    `dataloader_drop_last` as the rows of a batch, of which an epoch has whole ones alone."""
    found = {
        f.name: getattr(args, f.name)
        for f in fields(args)
        if f.name not in CHANGEABLE and not f.name.startswith(CHANGEABLE_PREFIXES) and instead_of(f) is None
    }
    found["rows_per_step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.dataloader_drop_last:
        found["dataloader_drop_last"] = args.per_device_train_batch_size * args.world_size
    return json.loads(json.dumps(found, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else str(value)


def adapter_settings(model: nn.Module) -> dict | None:
    """What a PEFT model's config says of the adapter that is trained."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return None
    found = {key: value for key, value in config.to_dict().items() if key not in NOT_OF_ADAPTER}
    return json.loads(json.dumps(found, default=_plain))


def data_digest(dataset) -> str | None:
    """Of all rows of a `datasets.Dataset` but what was computed for them; of a stream's first rows."""
    if isinstance(dataset, EndlessRows):
        dataset = dataset.first(LOOKED_AT)
    return rows_digest(dataset, CACHED_COLUMNS) if isinstance(dataset, Dataset) else None


def write_identity(folder: Path, identity: dict) -> None:
    (folder / FILE_NAME).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")


def read_identity(folder: str | Path) -> dict | None:
    """What was written; None for a checkpoint of a version that did not."""
    path = Path(folder) / FILE_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def first_day(args: Any) -> date | None:
    """On which the run began that `args` may go on with, where its chat template writes the date: what the checkpoint
    to resume from says, or the newest of `output_dir`."""
    wanted = resume_from(args.resume_from_checkpoint)
    named = isinstance(wanted, str) and wanted != "auto"
    folders = [Path(str(wanted))] if named else Path(args.output_dir).glob("checkpoint-*")
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime if path.exists() else 0, reverse=True):
        with suppress(OSError, ValueError):  # damage is told of where the checkpoint is read
            said = (read_identity(folder) or {}).get(TEMPLATE_DATE)
            return None if said is None else date.fromisoformat(said)
    return None


def names_in(folder: str | Path | None) -> set[str]:
    """What the run of a checkpoint was compared by, settings among it that were options in an older version alone."""
    before = {} if folder is None else read_identity(folder) or {}
    return {*before, *before.get("settings", {})}


def learning_rate_of(folder: str | Path) -> float | None:
    """Of the run that wrote a checkpoint."""
    return ((read_identity(folder) or {}).get("settings") or {}).get("learning_rate")


def code_marks(parts: dict[str, Any]) -> dict[str, str]:
    """By name what a user's functions, objects and classes among these parts of a run count for. Those of this library
    and of the ones under it are named by the settings."""
    return {name: mark(part) for name, part in parts.items() if _is_users(part)}


def _is_users(part: Any) -> bool:
    if isinstance(part, dict | list | tuple):
        return any(map(_is_users, part.values() if isinstance(part, dict) else part))
    part = inspect.unwrap(part) if isinstance(part, FunctionType) else part  # async tools are wrapped
    kind = part if isinstance(part, type | FunctionType) else type(part)
    module = kind.__globals__["__name__"] if isinstance(kind, FunctionType) else kind.__module__
    return part is not None and module.partition(".")[0] not in LIBRARIES


def differences(before: dict, now: dict, above: str = "") -> dict[str, tuple[Any, Any]]:
    """{name: (before, now)} of all that differs; nested settings by dotted names."""
    found: dict[str, Any] = {}
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{above}{key}.")
        elif a != b:
            found[f"{above}{key}"] = (a, b)
    return found


TEMPLATE_DATE, WANDB_RUN = "template_date", "wandb_run"
"""Notes for a resumed run, in which it may differ."""
OF_DATE = (
    ". The chat template writes the date, %s then and %s now, as the trainer was made without its checkpoint: set "
    "resume_from_checkpoint in its arguments, or keep its output_dir"
)
REWARDS, CODE = ("rewards.", "gold_reward"), "code."
OF_CODE = (
    ". A reward counts by its settings, its weights and the whole text of the file of its code: in a file of its own a "
    "function does not change with the script that trains"
)
OF_PARTS = (
    ". An environment, a tool or another part of yours counts by the whole text of the file of its code, which best is "
    "a file of its own"
)


def check_same_run(before: dict, now: dict, allowed: list[str], what: str) -> dict[str, tuple[Any, Any]]:
    """Raise `TrainingError` unless two identities are one, but for what is allowed by name; returns the allowed
    differences. Names of settings are given without `settings.`, and those of the batch all mean its size."""
    if "code" not in before:  # of a version that did not compare it
        now = {name: value for name, value in now.items() if name != "code"}
    found = differences(before, now)
    began, today = found.pop(TEMPLATE_DATE, (None, None))
    found.pop(WANDB_RUN, None)
    allowed_now = {}
    for name in list(found):
        short = name.removeprefix("settings.")
        known_as = {short, short.split(".")[0], *(BATCH if short == "rows_per_step" else ())}
        if known_as & set(allowed):
            allowed_now[short] = found.pop(name)
    if found:
        shown = "; ".join(
            f"{name.removeprefix('settings.')}: {a!r:.80} before, {b!r:.80} now" for name, (a, b) in found.items()
        )
        names = ", ".join(name.removeprefix("settings.") for name in found)
        changed = [name for name, values in found.items() if None not in values]
        of_code = OF_CODE * any(name.startswith(REWARDS) for name in changed)
        of_code += OF_PARTS * any(name.startswith(CODE) for name in changed)
        of_date = OF_DATE % (began, today) if began != today and "data" in found else ""
        raise TrainingError(
            f"{what} is of another run ({shown}). Start as that run did, use another output_dir, or allow the change: "
            f"resume_changes: [{names}]" + of_code + of_date
        )
    return allowed_now
