"""LoRA adapters in folders: the base that they name, adapters trained on adapters, and what a folder means.

An adapter that was trained on top of another one (SFT with LoRA, then DPO with LoRA) starts from weights that no folder
holds: those of the base with the first adapter merged. The sum of two LoRA updates is again one, of the sum of their
ranks, so both are saved as one adapter over the original base, which PEFT, transformers and vLLM load as any other.
`align_adapter.json` beside it says which of its ranks were there before (the reference is the base with these), and
carries a digest of the base's files, so that another model under the same path is not taken for it.
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import ConfigError
from align.modeling.mergeable import check_mergeable
from align.modeling.rotary import RECORD, record, recorded
from align.modeling.types import Model

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
NOTES_FILE, START_FILE = "align_adapter.json", "align_start_modules.safetensors"
PREFIX = "base_model.model."
A, B = (".lora_A.", ".lora_embedding_A"), (".lora_B.", ".lora_embedding_B")
OTHER_KINDS = ("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora")
FROZEN = ".base_layer."
"""In the name of a weight under an adapter, which PEFT saves beside it where it is that of the embeddings."""


@dataclass
class Start:
    """The adapter that a model was merged with when it was loaded.

    tensors: PEFT's names -> lora matrices, their scale in B, and whole modules (`modules_to_save`).
    problem: why a second adapter on it cannot be saved together with it, None if it can.
    """

    folder: str
    base: str
    tensors: dict[str, Tensor]
    problem: str | None


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG_FILE).exists()


def task_of(folder: str | Path) -> str | None:
    """PEFT's name for what an adapter is for: "SEQ_CLS" of a reward model."""
    return read_object(Path(folder) / CONFIG_FILE).get("task_type")


def check_answers(folder: str | Path) -> None:
    """ConfigError for an adapter that scores, where one of a language model is needed."""
    if task_of(folder) == "SEQ_CLS":
        raise ConfigError(f"{folder} is the adapter of a reward model, and a language model is needed here")


def adapter_base(folder: str | Path) -> str:
    """Folder or hub name of the model that an adapter's folder adapts. ConfigError if another model lies there now."""
    base = read_object(Path(folder) / CONFIG_FILE).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"the adapter {folder} names no base model: write it into base_model_name_or_path")
    before, now = notes(folder).get("base_digest"), folder_digest(base)
    if before and now and before != now:
        raise ConfigError(
            f"the adapter {folder} was trained on another model than {Path(base).absolute()} holds now: put its base "
            f"back, or write the path of it into base_model_name_or_path of {CONFIG_FILE}"
        )
    if now and not before and not Path(base).is_absolute():
        logger.warning("the adapter %s names its base by a relative path: %s is taken", folder, Path(base).absolute())
    return base


def named_base(base: str) -> str:
    """As an adapter's folder names its base: a folder by its absolute path, so that it is found from everywhere."""
    return str(Path(base).absolute()) if Path(base).is_dir() else base


def adapter_start(folder: str | Path) -> str:
    """What the training of an adapter started from: its base, or the adapter that it was trained on."""
    return notes(folder).get("start") or adapter_base(folder)


def notes(folder: str | Path) -> dict:
    """What `align_adapter.json` says; empty for an adapter that was saved by others."""
    path = Path(folder) / NOTES_FILE
    return read_object(path) if path.exists() else {}


def read_object(path: Path) -> dict:
    """A JSON file of an adapter. ConfigError for one that is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): copy the adapter again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged (it holds {content!r:.40}): copy the adapter again")
    return content


def folder_digest(folder: str | Path) -> str | None:
    """A digest of a model's weight files: names, sizes, and 64 samples of each. None where there are none."""
    files = sorted(path for end in ("*.safetensors", "*.bin") for path in Path(folder).glob(end) if path.is_file())
    files = [path for path in files if path.name not in (WEIGHTS_FILE, START_FILE, "training_args.bin")]
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size};".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(size // 64, 4096)):
                file.seek(offset)
                digest.update(file.read(4096))
    return digest.hexdigest()


def read_start(folder: str | Path, base: str) -> Start:
    """An adapter's folder as what a merged model started from."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    config, path = PeftConfig.from_pretrained(str(folder)), Path(folder) / WEIGHTS_FILE
    if not path.exists():
        raise ConfigError(f"{folder} has no {WEIGHTS_FILE}: save the adapter as safetensors")
    tensors = load_file(path)
    problem = not_plain(config, tensors)
    if problem is None:
        tensors = {n: v * _scaling(config, n, tensors) if _is(n, B) else v for n, v in tensors.items()}
        tensors = {n: v for n, v in tensors.items() if FROZEN not in n}
    return Start(str(Path(folder).absolute()), base, tensors, problem)


def not_plain(config, tensors: dict[str, Tensor] | None = None) -> str | None:
    """Why an adapter is more than a low-rank sum over the base's weights; None if it is just that."""
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        return f"it is of type {config.peft_type}"
    if changes_base(config):
        return f"init_lora_weights: {config.init_lora_weights} changes the base too"
    flags = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters", *OTHER_KINDS)
    given = [flag for flag in flags if vars(config).get(flag)] + (["bias"] if config.bias != "none" else [])
    if given:
        return f"it uses {', '.join(given)}"
    others = [name for name in tensors or () if ".lora_" in name and not _is(name, A + B)]
    return f"it holds {others[0]}" if others else None


def changes_base(config) -> bool:
    """Whether an adapter takes a part of the base's weights for its start (PiSSA, OLoRA ...)."""
    return vars(config).get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva")


def check_stack(model: Model, config) -> None:
    """ConfigError if a second adapter of this config could not be saved together with the first, or if merging the
    first one into quantised weights has rounded it away."""
    start: Start | None = vars(model).get("adapter_start")
    if start is None:
        return
    problem, second, merge = start.problem, not_plain(config), "Merge it first"
    if problem is None and second is not None:
        problem = f"that one is more than a low-rank sum ({second})"
        merge = "Leave this out, or merge the first one"
    if vars(model).get("is_quantized") or getattr(model, "is_loaded_in_4bit", False):
        problem = "merging it into quantised weights rounds most of it away"
    if problem:
        raise ConfigError(
            f"the adapter {start.folder} cannot be trained on with a second one: {problem}. {merge} "
            f"(`align export {start.folder} --to DIR`), and start from that folder"
        )


def check_overlap(model: nn.Module) -> None:
    """ConfigError for an adapter that could not be saved, or merged: of a module that one of two adapters trains in
    full and the other adapts there is no sum that PEFT would load, and a bias needs that of a layer."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if not isinstance(model, PeftModel):
        return
    check_mergeable(model)
    core = model.get_base_model()
    layers = {name: module for name, module in core.named_modules() if isinstance(module, LoraLayer)}
    start: Start | None = vars(core).get("adapter_start")
    if start is None:
        return
    whole = {name for name, module in core.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    before = {_module(name): _is(name, A + B) for name in start.tensors}
    twice = [name for name in layers if before.get(name) is False]
    twice += [name for name, low in before.items() if low and any(f"{name}.".startswith(f"{w}.") for w in whole)]
    if twice:
        raise ConfigError(
            f"{twice[0]} is trained in full by one of two adapters (modules_to_save) and adapted by the other, which "
            f"cannot be saved as one: give both the same modules, or merge the first (`align export {start.folder} "
            "--to DIR`) and start from that folder"
        )


def finish_adapter(folder: str | Path, model: Model) -> None:
    """After PEFT has written the trained adapter of `model` into `folder`: name the base by its absolute path, add the
    adapter that training started on, and write the notes. A PEFT model; the main process only."""
    from safetensors.torch import load_file, save_file

    folder, core = Path(folder), model.get_base_model()
    config = json.loads((folder / CONFIG_FILE).read_text())
    start: Start | None = vars(core).get("adapter_start")
    base = start.base if start else config["base_model_name_or_path"] or core.config.name_or_path
    base = config["base_model_name_or_path"] = base and named_base(base)
    found: dict[str, Any] = {"base_digest": folder_digest(base) if base else None}
    if start is not None:
        # the embeddings that a second adapter lies on hold the first one, which is saved with it
        trained = {n: v for n, v in load_file(folder / WEIGHTS_FILE).items() if FROZEN not in n}
        modules = {name for name, _ in core.named_modules()}
        kept = {n: v for n, v in start.tensors.items() if _module(n) in modules}
        both, changes, rank = combine(kept, trained, model.peft_config["default"])
        whole = {n: v.contiguous() for n, v in kept.items() if not _is(n, A + B)}
        save_file(both, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if whole:
            save_file(whole, folder / START_FILE, metadata={"format": "pt"})
            changes["modules_to_save"] = sorted({*(config["modules_to_save"] or ()), *map(_whole_module, whole)})
        config |= changes
        found |= {"start_rank": rank, "start": start.folder}
    if recorded(core) is not None:
        found[RECORD] = recorded(core)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / NOTES_FILE).write_text(json.dumps(found, indent=2) + "\n")


def combine(start: dict[str, Tensor], trained: dict[str, Tensor], config) -> tuple[dict[str, Tensor], dict, int]:
    """(tensors of the one adapter that is the sum, the keys of its config that follow, how many of its ranks are
    `start`'s). All modules get the same rank, zeros where only one of the two adapts them; the trained ranks are the
    last, bit by bit as they were trained."""
    modules = sorted({_module(name) for name in (*start, *trained) if _is(name, A)})
    scale = {m: _scaling(config, f"{PREFIX}{m}.lora_A.weight", trained) for m in modules}
    first = max((v.shape[0] for n, v in start.items() if _is(n, A)), default=0)
    last = max((v.shape[0] for n, v in trained.items() if _is(n, A)), default=0)
    both = {name: value for name, value in {**start, **trained}.items() if not _is(name, A + B)}
    for name in sorted({n for n in (*start, *trained) if _is(n, A + B)}):
        dim, module = (0, _module(name)) if _is(name, A) else (1, _module(name))
        like = trained[name] if name in trained else start[name]
        old = _padded(start.get(name), like, dim, first)
        new = _padded(trained.get(name), like, dim, last)
        if dim == 1:
            old = old / scale[module]
        both[name] = torch.cat([old.to(new.dtype), new], dim).contiguous()
    common = max(set(scale.values()), key=list(scale.values()).count)
    changes = {
        "r": first + last,
        "lora_alpha": _number(common * (first + last)),
        "rank_pattern": {},
        "alpha_pattern": {m: _number(s * (first + last)) for m, s in scale.items() if s != common},
        "use_rslora": False,
        "target_modules": modules,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    }
    return both, changes, first


def fit_base(model: Model, folder: str | Path) -> None:
    """Make a base what an adapter was trained on: with as many embeddings as its folder holds, where tokens were added
    and PEFT has saved them with the adapter, and with LongRoPE's factors as they were."""
    from safetensors import safe_open

    if kept := notes(folder):
        record(model, kept.get(RECORD))
    path, rows = Path(folder) / WEIGHTS_FILE, model.get_input_embeddings().weight.shape[0]
    if not path.exists():
        return
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    names = [PREFIX + name for name, module in model.named_modules() if module in ends]
    with safe_open(path, framework="pt") as file:
        held = {name for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        own = [f"{name}{kind}" for name in names for kind in (".weight", ".base_layer.weight")]
        found = {file.get_slice(name).get_shape()[0] for name in own if name in held}
    if len(found) == 1 and found != {rows}:
        model.resize_token_embeddings(found.pop(), mean_resizing=False)


def split(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what was there before training, what was trained) of a folder that `finish_adapter` wrote: tensors by PEFT's
    names, unscaled. The first is empty for an adapter on a plain base."""
    from safetensors.torch import load_file

    tensors, rank = load_file(Path(folder) / WEIGHTS_FILE), notes(folder).get("start_rank", 0)
    if "start_rank" not in notes(folder):
        return {}, tensors
    start, trained = {}, {}
    for name, value in tensors.items():
        if _is(name, A + B):
            dim = 0 if _is(name, A) else 1
            start[name] = value.narrow(dim, 0, rank).contiguous()
            trained[name] = value.narrow(dim, rank, value.shape[dim] - rank).contiguous()
        else:
            trained[name] = value
    path = Path(folder) / START_FILE
    return start | (load_file(path) if path.exists() else {}), trained


def by_names(config):
    """The PEFT config, or a copy in which a text of one module's name is a set of it. TRL makes a text of a list of
    one, and PEFT takes a text for a pattern of whole names: q_proj would match nothing."""
    target = getattr(config, "target_modules", None)
    if not isinstance(target, str) or not re.fullmatch(r"[\w.]+", target):
        return config
    config = copy.deepcopy(config)
    config.target_modules = {target}
    return config


@contextmanager
def adding_lora(model: nn.Module, said: str = "") -> Iterator[None]:
    """What PEFT refuses inside is a ConfigError with the names of the model's linear layers. said: what its errors say
    in lower case, where other ValueErrors may come from inside too."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    try:
        yield
    except ValueError as error:
        if said not in str(error).lower():
            raise
        raise ConfigError(
            f"LoRA cannot be added to {type(model).__name__}: {error} Its linear layers are {', '.join(sorted(names))} "
            "(on the command line: --lora_target_modules q_proj v_proj, or all-linear)"
        ) from error


def attached(model: Model, config, tensors: dict[str, Tensor]) -> Model:
    """The model with a part of the adapter of `config` (as `split` cuts it): a PEFT model of the rank of the part."""
    from peft import get_peft_model, set_peft_model_state_dict

    config = copy.deepcopy(config)
    rank = max(value.shape[0] for name, value in tensors.items() if _is(name, A))
    factor = rank / config.r
    config.alpha_pattern = {module: alpha * factor for module, alpha in config.alpha_pattern.items()}
    config.r, config.lora_alpha, config.inference_mode = rank, config.lora_alpha * factor, False
    held = {_whole_module(name) for name in tensors if not _is(name, A + B)}
    config.modules_to_save = sorted(held) or None
    adapted = get_peft_model(model, config)
    report = set_peft_model_state_dict(adapted, tensors)
    if report.unexpected_keys:
        raise ConfigError(f"the adapter holds tensors that the model has no place for: {report.unexpected_keys[:3]}")
    return adapted


def _padded(value: Tensor | None, like: Tensor, dim: int, rank: int) -> Tensor:
    """value with zeros up to `rank` along dim; all zeros, of the other sizes of `like`, where there is none."""
    shape = list(like.shape)
    shape[dim] = rank
    padded = torch.zeros(shape, dtype=like.dtype)
    if value is not None:
        padded = padded.to(value.dtype)
        padded.narrow(dim, 0, value.shape[dim]).copy_(value)
    return padded


def _is(name: str, kinds: tuple[str, ...]) -> bool:
    return any(kind in name for kind in kinds)


def _module(name: str) -> str:
    """The module that a tensor of an adapter belongs to: `model.layers.0.self_attn.q_proj`."""
    name = name.removeprefix(PREFIX)
    for kind in A + B:
        if kind in name:
            return name.split(kind)[0]
    return name.rpartition(".")[0]


def _whole_module(name: str) -> str:
    return _module(name).rpartition(".")[2]


def _scaling(config, name: str, tensors: dict[str, Tensor]) -> float:
    """What PEFT multiplies the update of the module of this tensor by: alpha / r, or alpha / sqrt(r)."""
    from peft.utils.other import get_pattern_key

    module = _module(name)
    alpha_key = get_pattern_key(config.alpha_pattern.keys(), module)
    rank_key = get_pattern_key(config.rank_pattern.keys(), module)
    alpha = config.alpha_pattern.get(alpha_key, config.lora_alpha)
    rank = config.rank_pattern.get(rank_key, config.r)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
