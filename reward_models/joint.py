"""Members of an ensemble that share one model: a trunk with upper layers per member, or LoRA adapters."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from align.distributed.disk import open_to_others
from align.errors import ConfigError, RewardError
from align.modeling.adapters import NOTES_FILE, adapter_base, folder_digest
from align.modeling.load import load_sequence_classifier, load_tokenizer
from align.modeling.member_lora import add_member_adapters, load_adapter, save_adapter
from align.modeling.members import copy_upper, member_state
from align.modeling.pretrained import weights_on_every_process
from align.modeling.score_head import read_at_end_token
from align.modeling.types import Model
from align.reward_models.base import RewardBatch, Steps
from align.reward_models.classifier import ClassifierReward, scoring_device
from align.reward_models.normalizer import Normalizer
from align.reward_models.sequences import same_tokenizer

TRUNK_FILE = "shared_trunk.safetensors"


class JointMembers:
    """K reward models in one: every batch is tokenised, padded and run once for all of them.

    load: loads the model with what `share_trunk` or `add_member_adapters` added. lora: whether the members are
    adapters. normalizers: one per member, or None for raw scores. options: of `ClassifierReward`. A token counts K
    times in `batch_tokens` with adapters, whose rows are multiplied from the first layers on, and twice with a shared
    trunk, where only the last hidden states are.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        names: Sequence[str],
        *,
        lora: bool,
        normalizers: Sequence[Normalizer] | None,
        name: str,
        **options,
    ):
        self.name, self.names, self.normalizers = name, list(names), normalizers
        self.classifier = ClassifierReward(load, name=name, normalize=False, **options)
        self.classifier.batch_tokens = max(self.classifier.batch_tokens // (len(self.names) if lora else 2), 1)

    def __len__(self) -> int:
        return len(self.names)

    def scores(self, batch: RewardBatch) -> Tensor:
        """Normalised scores [K, B], float32 on the CPU. Raises `RewardError` naming the member and the rows."""
        return self._normalised(self.classifier.numbers(self.classifier.inputs(batch)), batch)

    def steps(self, batch: RewardBatch) -> Steps[Tensor]:
        """`scores` in steps."""
        numbers = yield from self.classifier.steps_of_numbers(self.classifier.inputs(batch), batch)
        return self._normalised(numbers, batch)

    def _normalised(self, numbers: Tensor, batch: RewardBatch) -> Tensor:
        if not len(batch):
            return torch.empty(len(self), 0)
        raw = numbers.view(len(batch), -1).T
        if len(raw) != len(self):
            raise RewardError(f"reward {self.name!r}: the model has {len(raw)} members, {len(self)} are named")
        if self.normalizers is not None:
            raw = torch.stack([fitted(row) for fitted, row in zip(self.normalizers, raw, strict=True)])
        for name, row in zip(self.names, raw, strict=True):
            bad = torch.nonzero(~torch.isfinite(row)).flatten().tolist()
            if bad:
                raise RewardError(
                    f"reward {self.name!r}: {name} returned a non-finite score ({row[bad[0]].item()}) for "
                    f"{batch.row_names(bad)}"
                )
        return raw.float()


# ---- a shared trunk -------------------------------------------------------------------------------------------------


def save_trunk(model: Model, folder: Path) -> None:
    """Weights of trunk and members in one file, and the config beside it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, folder / TRUNK_FILE)
    open_to_others(folder)


def load_trunk(folder: Path, members: int, upper_layers: int, dtype) -> Model:
    """The model that `save_trunk` wrote. Raises `RewardError` for weights of other members or layers."""
    import transformers
    from safetensors.torch import load_file

    path = folder / TRUNK_FILE
    if not path.is_file():
        raise RewardError(f"{folder} has no {TRUNK_FILE}: the ensemble was not saved whole")
    state, config = load_file(path), transformers.AutoConfig.from_pretrained(folder)
    if dtype != "auto":
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        state = {name: value.to(dtype) for name, value in state.items()}
    architecture = getattr(transformers, config.architectures[0])
    with weights_on_every_process():
        model = architecture.from_pretrained(None, config=config, state_dict=member_state(state, 0), dtype=dtype)
    copy_upper(model, members, upper_layers)
    try:
        model.load_state_dict(state, assign=True)  # not into copies: what is read stays in memory otherwise
    except RuntimeError as error:
        raise RewardError(f"{path} does not hold {members} members of {upper_layers} layers: {error}") from error
    return model


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def save_adapters(model: Model, folders: Sequence[Path], peft_config, tokenizer) -> None:
    """One PEFT adapter per member; each folder is a classifier by itself."""
    for index, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(model, index, peft_config, folder)
        digest = folder_digest(model.config.name_or_path)
        (folder / NOTES_FILE).write_text(json.dumps({"base_digest": digest}, indent=2) + "\n")
        tokenizer.save_pretrained(folder)


def load_adapters(folders: Sequence[Path], dtype) -> Model:
    """The base model once, with the adapter and head of every folder. Raises `ConfigError` naming a folder that was
    trained on another base, with other options, or with another tokenizer."""
    from peft import PeftConfig

    configs = [PeftConfig.from_pretrained(str(folder)) for folder in folders]
    base = adapter_base(folders[0])
    for folder, config in zip(folders, configs, strict=True):
        if config.base_model_name_or_path != base:
            raise ConfigError(f"{folder} adapts {config.base_model_name_or_path}, and {folders[0]} adapts {base}")
        if config.to_dict() != configs[0].to_dict():
            raise ConfigError(f"{folder} and {folders[0]} are adapters with different options")
    model = load_sequence_classifier(base, dtype=dtype)
    read_at_end_token(model)  # as the members were trained; the base's config does not say it
    add_member_adapters(model, configs[0], list(range(len(folders))))
    for index, folder in enumerate(folders):
        load_adapter(model, index, folder)
    return model


# ---- both -----------------------------------------------------------------------------------------------------------


def _normalizer(name: str, member: Path) -> Normalizer:
    found = Normalizer.load(member)
    if found is None:
        raise RewardError(
            f"reward {name!r}: normalize is true and {member.name} has no normaliser beside it; "
            "train_reward_ensemble saves them"
        )
    return found


def load_joint(folder: Path, saved: dict, members: Sequence[Path], *, name: str, normalize: bool, **options):
    """The `JointMembers` of a saved ensemble. saved: its ensemble.json."""
    device, dtype = scoring_device(options.pop("device", None), options.pop("dtype", None))
    lora = saved["kind"] == "lora"
    tokenizers = [load_tokenizer(member) for member in members] if lora else [load_tokenizer(folder)]
    check_tokenizers([member.name for member in members], tokenizers)

    def load() -> Model:
        if lora:
            return load_adapters(members, dtype)
        return load_trunk(folder, len(members), saved["upper_layers"], dtype)

    names = [member.name for member in members]
    normalizers = [_normalizer(name, member) for member in members] if normalize else None
    return JointMembers(
        load, names, lora=lora, normalizers=normalizers, name=name, tokenizer=tokenizers[0], device=device, **options
    )


def check_tokenizers(names: Sequence[str], tokenizers: Sequence) -> None:
    """Raise `ConfigError` naming the first member whose token ids or prompts mean something else than member 0's."""
    first = tokenizers[0]
    for name, other in zip(names, tokenizers, strict=False):
        if not same_tokenizer(first, other):
            what = "vocabulary" if first.get_vocab() != other.get_vocab() else "chat template or end token"
            raise ConfigError(
                f"member {name!r} has another {what} than member {names[0]!r}: an ensemble's members must read the "
                "same text. Train them with one tokenizer"
            )
