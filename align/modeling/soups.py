"""Soups: one policy from several that started at the same base, by adding up what each has learnt.

theta(w) = base + sum_k w_k (theta_k - base)      (rewarded soups, Rame et al. 2023, arXiv 2306.04488)
"""

import json
import logging
import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from align.data.ending import generation_with_ends
from align.distributed.disk import open_to_others
from align.errors import ConfigError
from align.modeling.adapters import (
    CONFIG_FILE,
    NOTES_FILE,
    WEIGHTS_FILE,
    adapter_base,
    folder_digest,
    is_adapter,
    named_base,
    notes,
)
from align.modeling.load import load_policy, load_tokenizer
from align.modeling.processor_files import keep_processor
from align.modeling.rotary import RECORD

logger = logging.getLogger(__name__)


def make_soup(folders: Sequence[str | Path], weights: Sequence[float], output_dir: str | Path) -> Path:
    """Write the soup of saved policies, with their tokenizer, to `output_dir`, and return that.

    LoRA adapters of one base become one adapter whose delta is exactly `sum_k w_k B_k A_k`: their factors are set side
    by side, so its rank is the sum of theirs. (Averaging the factors A and B would add cross terms.) Whole models are
    averaged weight by weight; their weights must sum to 1. Raises ConfigError for policies that have no exact soup.
    A model that `output_dir` holds is deleted: the folder stands for what was written last.
    """
    policies, output_dir = [Path(folder) for folder in folders], Path(output_dir)
    if not policies or len(policies) != len(weights):
        raise ConfigError(
            f"a soup needs one weight per policy, got {len(policies)} policies and {len(weights)} weights"
        )
    weights = [weight.item() if isinstance(weight, Tensor) else weight for weight in weights]
    if not all(isinstance(weight, Real) and math.isfinite(weight) for weight in weights):
        raise ConfigError(f"the weights of a soup are finite numbers, got {list(weights)}")
    if output_dir.resolve() in {folder.resolve() for folder in policies}:
        raise ConfigError(f"output_dir {output_dir} is the folder of one of the policies: a soup needs one of its own")
    are_adapters = {is_adapter(folder) for folder in policies}
    if len(are_adapters) > 1:
        raise ConfigError(f"a soup is of adapters or of whole models, not of both: {', '.join(map(str, policies))}")
    if are_adapters.pop():
        _adapter_soup(policies, weights, output_dir)
    else:
        _model_soup(policies, weights, output_dir)
    tokenizer = load_tokenizer(policies[0])
    tokenizer.save_pretrained(output_dir)
    generation_with_ends(_generation(policies[0]), tokenizer).save_pretrained(output_dir)
    open_to_others(output_dir)
    return output_dir


def _generation(folder: Path):
    """The generation config of a policy, or of an adapter's base."""
    from transformers import GenerationConfig

    while is_adapter(folder) and not (folder / "generation_config.json").exists():
        folder = Path(adapter_base(folder))
    known = (folder / "generation_config.json").exists()
    return GenerationConfig.from_pretrained(folder) if known else GenerationConfig()


def _clear(folder: Path) -> None:
    """Delete the weights of a model or an adapter that would be loaded beside what is written now."""
    for pattern in ("*.safetensors", "*.bin", "*.index.json", CONFIG_FILE, NOTES_FILE, "config.json"):
        for path in folder.glob(pattern):
            path.unlink()


def concatenate(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors (A [sum r, in], B [out, sum r]) of `sum_k w_k B_k A_k`, from those of its terms, (A_k [r_k, in], B_k)."""
    a = torch.cat([a.float() for a, _ in factors], dim=0)
    b = torch.cat([w * b.float() for w, (_, b) in zip(weights, factors, strict=True)], dim=1)
    return a, b


# ---- adapters -------------------------------------------------------------------------------------------------------


def _adapter_soup(folders: list[Path], weights: Sequence[float], output_dir: Path) -> None:
    from peft import LoraConfig, PeftConfig
    from peft.utils import load_peft_weights
    from safetensors.torch import save_file

    configs = [PeftConfig.from_pretrained(str(folder)) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        _check_adapter(folder, config, configs[0])
    base = named_base(adapter_base(folders[0]))
    if output_dir.resolve() == Path(base).resolve():
        raise ConfigError(f"output_dir {output_dir} is the folder of the base model: a soup needs one of its own")
    if len(factors := {notes(folder).get(RECORD) for folder in folders}) > 1:
        raise ConfigError(f"some of the adapters were trained with long rotary factors: {', '.join(map(str, folders))}")
    states = [load_peft_weights(str(folder), device="cpu") for folder in folders]
    if any(state.keys() != states[0].keys() for state in states):
        raise ConfigError(f"the adapters change different layers: {', '.join(map(str, folders))}")
    soup: dict[str, Tensor] = {}
    scaled = [weight * _scale(config) for weight, config in zip(weights, configs, strict=True)]
    for name in states[0]:
        if "lora_A" in name or "lora_embedding_A" in name:
            other = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            soup[name], soup[other] = concatenate([(state[name], state[other]) for state in states], scaled)
    left = sorted(states[0].keys() - soup.keys())
    if left:
        raise ConfigError(f"{folders[0]} holds {left[0]}, which is no factor of LoRA: its soup would not be exact")
    joined: LoraConfig = configs[0]
    joined.r = joined.lora_alpha = sum(other.r for other in configs)  # scale 1: the scales are in B
    joined.use_rslora, joined.lora_dropout, joined.inference_mode = False, 0.0, True
    joined.base_model_name_or_path = base
    output_dir.mkdir(parents=True, exist_ok=True)
    _clear(output_dir)
    save_file({name: values.contiguous() for name, values in soup.items()}, output_dir / WEIGHTS_FILE)
    joined.save_pretrained(str(output_dir))
    found = {"base_digest": folder_digest(base), RECORD: factors.pop()}
    found = {key: value for key, value in found.items() if value is not None}
    (output_dir / NOTES_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _check_adapter(folder: Path, config, first) -> None:
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{folder} is an adapter of type {config.peft_type}: only LoRA has exact soups")
    adapter_base(folder)  # another model that lies there now is an error
    if config.base_model_name_or_path != first.base_model_name_or_path:
        raise ConfigError(
            f"{folder} is an adapter of {config.base_model_name_or_path}, the first one of "
            f"{first.base_model_name_or_path}: a soup is of adapters of one base"
        )
    exact = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "bias": "none"}
    given = [name for name, value in exact.items() if getattr(config, name) not in (value, [])]
    if given:
        raise ConfigError(f"{folder} is an adapter with {', '.join(given)}, which has no exact soup")

    # by a kind of start that takes its product out of the base's weights, again whenever the adapter is loaded
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ConfigError(
            f"{folder} is an adapter with init_lora_weights={config.init_lora_weights!r}: its base is another than "
            "the saved one, so it has no soup as it is. Merge it into its base, or save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )


def _scale(config) -> float:
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


# ---- whole models ---------------------------------------------------------------------------------------------------


def _model_soup(folders: list[Path], weights: Sequence[float], output_dir: Path) -> None:
    if abs(sum(weights) - 1) > 1e-6:
        raise ConfigError(f"the weights of a soup of whole models sum to 1, got {list(weights)}")
    model = load_policy(folders[0], dtype="auto")
    total = {name: weights[0] * values.float() for name, values in model.state_dict().items()}
    for folder, weight in zip(folders[1:], weights[1:], strict=True):
        state = load_policy(folder, dtype="auto").state_dict()
        shapes, others = ({name: v.shape for name, v in s.items()} for s in (total, state))
        if shapes != others:
            raise ConfigError(f"{folder} and {folders[0]} are models of different shapes: a soup is of one base")
        for name, values in state.items():
            total[name] += weight * values.float()
    with torch.no_grad():
        for name, values in model.state_dict().items():
            values.copy_(total.pop(name))
    output_dir.mkdir(parents=True, exist_ok=True)
    _clear(output_dir)
    model.save_pretrained(output_dir)
    keep_processor(model, output_dir)
