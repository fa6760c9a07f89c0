"""The dataclasses whose fields are the options of a method, and what is asked of their fields. Imports no torch, until
a method's own classes are asked for."""

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_type_hints

from align.errors import ConfigError
from align.lazy import load
from align.methods import Method

REWARD_SECTIONS = ("rewards", "gold_reward")
INSTEAD = ". Instead: "


@dataclass
class DataArguments:
    """Which rows are trained and evaluated on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Local .parquet, .jsonl, .json or .csv file or folder, or a hub dataset."}
    )
    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Several datasets to train on together, instead of dataset_name, which evaluations still read: a "
            "list of {path, name, split, weight, columns} (docs/data.md)."
        },
    )
    mixture_seed: int = field(default=0, metadata={"help": "Draws the rows of datasets with a weight, and the order."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset, or of its copy."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, read only when eval_strategy is not 'no'."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Other file (all of it), folder or hub dataset to evaluate on. Default: dataset_name."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training rows as they are needed; with max_steps, for SFT, preferences, rewards."},
    )

    def __post_init__(self):
        if self.datasets is not None and self.streaming:
            raise ConfigError("streaming: the rows of several datasets are drawn among all of them: leave it out")
        if self.mixture_seed and self.datasets is None:
            raise ConfigError("mixture_seed needs datasets: there is nothing to draw")


@dataclass
class EnsembleArguments:
    """How many models are trained, how they are held, and with which share of wrong labels."""

    ensemble: int = field(
        default=1, metadata={"help": "Train so many members that differ in seed, in output_dir/member_<i>."}
    )
    ensemble_kind: str = field(
        default="separate",
        metadata={
            "help": "How members are held: models of their own, LoRA adapters on one frozen model (with use_peft), or "
            "upper layers on a shared trunk. The last two are trained from one pass over the data.",
            "choices": ["separate", "lora", "shared_trunk"],
        },
    )
    ensemble_member: int | None = field(
        default=None,
        metadata={"help": "Train this separate member alone (0 is the first), so that each can be a job of its own."},
    )
    ensemble_upper_layers: int | None = field(
        default=None, metadata={"help": "Of a shared trunk: layers that each member has of its own."}
    )
    ensemble_train_trunk: bool = field(
        default=False, metadata={"help": "Train the shared layers too. Default: they are frozen."}
    )
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training pairs whose labels are flipped, to study wrong labels; output_dir/"
            "flipped_labels.json says which."
        },
    )
    label_noise_seed: int = field(
        default=0, metadata={"help": "Draws the flipped pairs; the seed of the run and its members do not."}
    )

    def __post_init__(self):
        if self.ensemble < 1:
            raise ConfigError(f"ensemble counts from 1, got {self.ensemble}")
        trunk = self.ensemble_kind == "shared_trunk"
        if trunk and not self.ensemble_upper_layers:
            raise ConfigError("ensemble_kind shared_trunk needs ensemble_upper_layers: each member's own layers")
        if not trunk and (self.ensemble_upper_layers is not None or self.ensemble_train_trunk):
            raise ConfigError("ensemble_upper_layers and ensemble_train_trunk belong to ensemble_kind shared_trunk")
        if self.ensemble == 1 and self.ensemble_kind != "separate":
            raise ConfigError(f"ensemble_kind {self.ensemble_kind} needs an ensemble of 2 or more, not 1")
        if self.ensemble_member is not None and (self.ensemble_kind != "separate" or self.ensemble == 1):
            raise ConfigError("ensemble_member needs an ensemble of 2 or more of ensemble_kind separate")
        if not 0 <= self.label_noise < 1:
            raise ConfigError(f"label_noise is a share in [0, 1), got {self.label_noise}")
        if self.label_noise_seed and not self.label_noise:
            raise ConfigError("label_noise_seed needs label_noise: there is nothing to draw")

    @property
    def several(self) -> bool:
        return self.ensemble > 1


def reward_sections(method: Method) -> tuple[str, ...]:
    """The keys of the file that hold reward specs."""
    return () if not method.rewards else REWARD_SECTIONS if method.gold else REWARD_SECTIONS[:1]


def option_classes(method: Method) -> dict[str, type]:
    """The dataclasses whose fields are the options of a method."""
    from trl import ModelConfig

    classes: dict[str, type] = {"training": load(method.config), "model": ModelConfig, "data": DataArguments}
    return {**classes, "ensemble": EnsembleArguments} if method.ensemble else classes


def own_fields(cls: type) -> list[str]:
    """The fields that a method's config declares itself, or whose default it changes."""
    from transformers import TrainingArguments

    added = [c for c in cls.__mro__ if dataclasses.is_dataclass(c) and c not in TrainingArguments.__mro__]
    return [name for name in init_fields(cls) if any(name in c.__dict__.get("__annotations__", {}) for c in added)]


@cache
def init_fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


@cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a class's fields. Of a class of the user's whose annotations name what only its function knows, the
    types of its own fields are `Any`."""
    try:
        return get_type_hints(cls)
    except NameError:
        above = {
            name: hint for base in reversed(cls.__mro__[1:]) if base is not object for name, hint in hints(base).items()
        }
        return {**above, **dict.fromkeys(cls.__dict__.get("__annotations__", {}), Any)}


def instead_of(option: dataclasses.Field) -> str | None:
    """What to do instead of a field that is another library's name without effect here, None of others. It stands in
    the help alone: TRL's parser gives all of a field's metadata to argparse, which takes no words of ours."""
    return str(option.metadata.get("help", "")).partition(INSTEAD)[2].removesuffix(".") or None


def resume_from(value: str | bool | None) -> str | bool | None:
    """What `Trainer.train` takes: True for the newest whole checkpoint, "auto" for that if there is one (for jobs that
    are requeued), a folder, or None to start from the beginning."""
    word = "false" if value is None else str(value).lower()
    return {"true": True, "false": None, "auto": "auto"}.get(word, value)
