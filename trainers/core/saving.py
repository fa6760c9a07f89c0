"""Checks and completes a saved folder: the base of an adapter, the weights on disk."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from align.data.ending import generation_with_ends
from align.distributed.disk import open_to_others, writing
from align.distributed.ranks import in_all, raise_shared
from align.distributed.shards import is_zero3
from align.errors import AlignError, ConfigError, TrainingError, one_line
from align.modeling.adapter_names import check_names
from align.modeling.adapters import (
    CONFIG_FILE,
    NOTES_FILE,
    PREFIX,
    START_FILE,
    WEIGHTS_FILE,
    changes_base,
    check_stack,
    finish_adapter,
    folder_digest,
    notes,
)
from align.modeling.processor_files import keep_processor
from align.modeling.token_masks import FILE_NAME as MASKS_FILE
from align.modeling.types import Model
from align.reward_models.ensemble import FILE_NAME as ENSEMBLE_FILE
from align.reward_models.normalizer import FILE_NAME as NORMALIZER_FILE
from align.rollout.weights import as_in_checkpoint
from align.trainers.on_policy.meta_learner import FILE as META_FILE

logger = logging.getLogger(__name__)

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, NOTES_FILE, START_FILE, "adapter_model.bin")
TEMPLATE_FILE, GENERATION_FILE = "chat_template.jinja", "generation_config.json"
MODEL_FILES = ("config.json", "model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
FILES_BESIDE = (ENSEMBLE_FILE, NORMALIZER_FILE, MASKS_FILE, META_FILE)
"""Written after the model by those that have them."""
PROBED_LAYERS = 8
NOT_TRAINED_SO = {  # kinds of adapters by PEFT's names, and what the trainers do not do for them
    "ADALORA": "its ranks are chosen by update_and_allocate after every step",
    "ADAPTION_PROMPT": "it is a part of the attention's own code, around which log-probs are computed",
    **dict.fromkeys(("POLY", "MULTITASK_PROMPT_TUNING"), "every row needs the number of its task"),
}
REFUSED_OPTIONS = {  # of LoRA
    "alora_invocation_tokens": "an activated adapter looks for these tokens in whole rows that are padded, and with "
    "the passes of the trainers here it would get no gradient",
    "kasa_config": "it cuts the frozen weights, and needs a loss of its own beside the method's",
    "monteclora_config": "it needs a loss of its own beside the method's",
}


def is_peft(model: nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def check_base(model: Model, output_dir: str | None) -> None:
    """Before training an adapter: ConfigError if its folder could not name the model that it adapts. The weights of a
    model that was not loaded by us are compared with those of the folder that it says it came from (samples of each).
    Call it on the main process, before the weights are sharded."""
    from peft.tuners.lora import LoraLayer

    if not is_peft(model):
        return
    core, config = model.get_base_model(), model.peft_config["default"]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind in NOT_TRAINED_SO:
        raise ConfigError(f"an adapter of type {kind} cannot be trained here: {NOT_TRAINED_SO[kind]}. Use LoRA")
    for option, reason in REFUSED_OPTIONS.items():
        if vars(config).get(option):
            raise ConfigError(f"{option}: {reason}: leave it out")
    if vars(config).get("use_qalora") and not vars(core).get("is_quantized"):
        raise ConfigError("use_qalora: it is for GPTQ weights alone, and changes nothing of these: leave it out")
    if config.task_type not in (None, "CAUSAL_LM") and getattr(core, "generation_config", None) is not None:
        raise ConfigError(
            f"task_type: {config.task_type} is not for a language model, and what was saved would not be loaded as "
            "one: leave it out"
        )
    check_names(core, config)
    still = [n for n, m in core.named_modules() if isinstance(m, LoraLayer) if not all(m.scaling.values())]
    if still:
        of = "alpha_pattern" if config.lora_alpha else "lora_alpha"
        raise ConfigError(
            f"{of}: 0 multiplies the adapter of {still[0]} by 0, so that it would not be trained: set it above 0, or "
            "leave the layer out of target_modules"
        )
    if changes_base(config):
        raise ConfigError(
            f"init_lora_weights: {config.init_lora_weights} changes the frozen weights too, so that the model with its "
            "adapter off is not the one that training starts from, and the adapter's folder not the one that was "
            "trained: use true, gaussian, orthogonal or eva"
        )
    check_stack(core, config)  # with the targets that PEFT has chosen (experts' parameters for all-linear)
    base = config.base_model_name_or_path or core.config.name_or_path
    if not base:
        raise ConfigError(
            "the model was not loaded from anywhere, so its adapter would name no base and could not be loaded: save "
            "the model in a folder, and start from that"
        )
    if output_dir and Path(base).is_dir() and Path(base).resolve() == Path(output_dir).resolve():
        raise ConfigError(f"output_dir {output_dir} is the folder of the base model: an adapter needs one of its own")
    apart = is_zero3(core.parameters())  # by DeepSpeed, while they were loaded
    if vars(core).get("adapter_start") is None and not vars(core).get("is_quantized") and not apart:
        name = _first_difference(core, Path(base))
        if name:
            raise ConfigError(
                f"{name} of the model given is not that of {base}, which its adapter would name as its base: save the "
                "model in a folder, and start from that"
            )


def _first_difference(core: nn.Module, base: Path) -> str | None:
    """The first frozen weight that differs from the one of its name in the folder; None if none does, as far as the
    names are the same."""
    from safetensors import safe_open

    live = {name.replace(".base_layer", ""): value for name, value in core.named_parameters() if not value.is_meta}
    for path in sorted(base.glob("*.safetensors")):
        if path.name in (WEIGHTS_FILE, START_FILE):
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                part, value = file.get_slice(name), live.get(name)
                if value is None or value.requires_grad or list(value.shape) != part.get_shape() or not value.dim():
                    continue
                if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):  # FP8: the numbers are these times scales
                    continue
                saved = part[:1].to(value.device, value.dtype)
                if not torch.equal(saved, value[:1]):
                    return name
    return None


@contextmanager
def whole_model(accelerator: Any):
    """Under FSDP's SHARDED_STATE_DICT, accelerate's default, checkpoints are shards of the processes, and transformers
    saves a model not at all: here it is gathered as under FULL_STATE_DICT."""
    from torch.distributed.fsdp import StateDictType

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    before, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before


@contextmanager
def declared_later(args: Any):
    """Inside, transformers' save of a checkpoint neither deletes older ones nor pushes the new one, which has not all
    of its files yet. Gives `save_total_limit` and `push_to_hub`, for when it has."""
    given = args.save_total_limit, args.push_to_hub
    args.save_total_limit, args.push_to_hub = None, False
    try:
        yield given
    finally:
        args.save_total_limit, args.push_to_hub = given


class DiskErrors:
    """What the disk said to this process while a checkpoint is written, or what else went wrong in its own part.

    It must not leave transformers' save, in which others are in a collective then, or come to one: they would wait for
    this process until `ddp_timeout`. So it goes on, and all end together when everything else is written.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder
        self.found: AlignError | None = None

    def keep(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`write(*args, **kwargs)`, or None where the disk does not take it."""
        try:
            with writing(self.folder):
                try:
                    return write(*args, **kwargs)
                except CheckpointException as error:  # of torch's sharded files, in all processes
                    raise next(failure for failure, _ in error.failures.values()) from error
        except TrainingError as error:
            self.found = self.found or error
            return None

    def keep_any(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same of whatever goes wrong in what this process does alone."""
        try:
            return self.keep(write, *args, **kwargs)
        except AlignError as error:
            self.found = self.found or error
        except Exception as error:
            if not dist.is_initialized():
                raise
            failure = TrainingError(
                f"process {dist.get_rank()} could not write its part of {self.folder}: {type(error).__name__}: "
                f"{one_line(error)}"
            )
            failure.__cause__ = error
            self.found = self.found or failure
        return None

    def raise_in_all(self) -> None:
        """All processes must call it."""
        raise_shared(self.found)


@contextmanager
def errors_kept(trainer: Any, folder: str | Path) -> Iterator[DiskErrors]:
    """Inside, neither the trainer's `_save` nor `torch.save` raises an error, for which transformers' save has no other
    place."""
    errors, save = DiskErrors(folder), torch.save

    def kept(*args: Any, **kwargs: Any) -> None:
        if errors.found is None:  # on a full disk further files fail in further ways
            errors.keep_any(save, *args, **kwargs)

    trainer.disk_errors, torch.save = errors, kept
    try:
        yield errors
    finally:
        trainer.disk_errors, torch.save = None, save


def begin_folder(trainer: Any, folder: Path) -> None:
    """An empty folder for a checkpoint, there for every process: transformers' save makes it between its collectives.
    Where one process cannot, its error in all."""
    parts, args = [folder], trainer.args
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.state_dict_type.name == "SHARDED_STATE_DICT" and not args.save_only_model:
        parts += [folder / f"{name}_0" for name in (FSDP_MODEL_NAME, OPTIMIZER_NAME)]

    def clear() -> None:
        with writing(folder):
            if args.should_save and folder.exists():  # damaged, or of an earlier run
                shutil.rmtree(folder)

    def make() -> None:
        with writing(folder):
            for part in parts:
                part.mkdir(parents=True, exist_ok=True)

    in_all(clear)
    in_all(make)


def finish_folder(folder: str | Path, model: Model, tokenizer: Any = None) -> None:
    """After transformers or PEFT has written the model, and its tokenizer: complete an adapter's folder, and delete
    what an earlier run has left there that would be loaded instead."""
    folder = Path(folder)
    core = model.get_base_model() if is_peft(model) else model
    generation = getattr(core, "generation_config", None)  # a classifier has none
    if is_peft(model):
        finish_adapter(folder, model)
        stale = [path for pattern in MODEL_FILES for path in folder.glob(pattern)]
        stale = [path for path in stale if path.name not in ADAPTER_FILES]
    else:
        keep_processor(core, folder)
        stale = [*(folder / name for name in ADAPTER_FILES), *_older_weights(folder)]
    stale += [folder / name for name in FILES_BESIDE]
    if tokenizer is not None and tokenizer.chat_template is None:
        stale.append(folder / TEMPLATE_FILE)
    for path in stale:
        path.unlink(missing_ok=True)
    if generation is None:
        (folder / GENERATION_FILE).unlink(missing_ok=True)
    else:  # transformers writes the model's own, and none beside an adapter
        (generation if tokenizer is None else generation_with_ends(generation, tokenizer)).save_pretrained(folder)
    open_to_others(folder)


def _older_weights(folder: Path) -> list[Path]:
    """Weights of an earlier save beside those of the last one, which are whole or in parts with an index: loaders do
    not agree on which of the two they read."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    older = list(folder.glob("pytorch_model*.bin*"))
    if not (whole.exists() and index.exists()):
        return older
    if whole.stat().st_mtime_ns < index.stat().st_mtime_ns:
        return [*older, whole]
    parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [*older, index, *(folder / part for part in parts)]


# ---- verification ----------------------------------------------------------------------------------------------------


def verify_saved(folder: str | Path, model: Model, state: Mapping[str, Tensor]) -> None:
    """Raise `TrainingError` unless the folder holds what was trained. state: the whole tensors of `model` by name, as
    they were given to `save_pretrained`.

    Reads the files back tensor by tensor: a whole model bit by bit; of an adapter, the modules trained in full bit by
    bit, and for some layers the update that PEFT will make of files and config against the one that was trained.
    """
    problem = (
        _adapter_problem(Path(folder), model, state) if is_peft(model) else _model_problem(Path(folder), model, state)
    )
    if problem:
        raise TrainingError(f"what was saved in {folder} is not what was trained: {problem}")


def _model_problem(folder: Path, model: Model, state: Mapping[str, Tensor]) -> str | None:
    from safetensors import safe_open

    if (folder / CONFIG_FILE).exists():
        return f"{CONFIG_FILE} of another run is there, and would be loaded"
    seen = set()
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("model*.safetensors"))
        ]
        places = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        for name, live in as_in_checkpoint(model, state.items()):
            if name not in places:  # the second of two tied weights
                continue
            saved = places[name].get_tensor(name)
            seen.add(name)
            if not torch.equal(saved, live.detach().to(saved.device, saved.dtype)):
                return f"{name} differs"
    if not seen:
        return "no tensor has the name of one that was trained"
    if others := sorted(places.keys() - seen):
        logger.warning(
            "%s: %d of %d tensors were not compared with what was trained, as nothing there has their names (%s ...)",
            *(folder, len(others), len(places), others[0]),
        )
    return None


def _adapter_problem(folder: Path, model: Model, state: Mapping[str, Tensor]) -> str | None:
    from peft import PeftConfig
    from peft.tuners.lora import LoraLayer
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    from safetensors.torch import load_file

    config, saved = PeftConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS_FILE)
    digest = notes(folder).get("base_digest")
    if digest and digest != folder_digest(config.base_model_name_or_path):
        return f"its base {config.base_model_name_or_path} has changed"
    start = vars(model.get_base_model()).get("adapter_start")
    for name, value in saved.items():
        live = state.get(_held_name(name, state))
        if ".lora_" not in name and live is not None:
            if not torch.equal(value, live.detach().to(value.device, value.dtype)):
                return f"{name} differs"
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and "default" in m.lora_A}
    names = list(layers)
    found = convert_peft_adapter_state_dict_for_transformers(model, config, dict(saved))
    lost = [n for n in names if f"{n}.lora_A.weight" in saved and f"{n}.lora_A.weight" not in found]
    if lost:  # transformers' renaming of Laguna's checkpoints is applied to its adapters' right names too
        return f"PEFT loads {lost[0]} under another name, and drops it: leave such layers out of target_modules"
    for name in names[:: max(len(names) // PROBED_LAYERS, 1)]:
        trained = _update(state, f"{name}.lora_{{}}.default.weight", layers[name].scaling["default"])
        if start is not None and f"{name}.lora_A.weight" in start.tensors:
            trained = trained + _update(start.tensors, f"{name}.lora_{{}}.weight", 1.0)
        loaded = _update(saved, f"{name}.lora_{{}}.weight", _config_scaling(config, name))
        if not (loaded - trained).norm() <= 1e-3 * trained.norm():
            return f"the update of {name} differs by {(loaded - trained).norm():.3g}, it is {trained.norm():.3g}"
    return None


def _held_name(name: str, state: Mapping[str, Tensor]) -> str:
    """The name in the live model of a tensor that PEFT saves for a module trained in full."""
    module, _, leaf = name.rpartition(".")
    held = f"{module}.modules_to_save.default.{leaf}"
    return held if held in state else name


def _update(tensors: Mapping[str, Tensor], name: str, scaling: float) -> Tensor:
    a, b = (tensors[name.format(letter)].detach().cpu().float() for letter in "AB")
    return scaling * (b.flatten(1) @ a.flatten(1))


def _config_scaling(config, name: str) -> float:
    from peft.utils.other import get_pattern_key

    module = name.removeprefix(PREFIX)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    return alpha / (rank**0.5 if config.use_rslora else rank)
