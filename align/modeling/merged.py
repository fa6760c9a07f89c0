"""The model that the folder of an adapter stands for, the adapter merged into its base."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from align.distributed.shells import fill
from align.errors import ConfigError, one_line
from align.modeling.adapters import adapter_base, check_answers, fit_base, is_adapter, notes, read_start, task_of
from align.modeling.mergeable import check_mergeable
from align.modeling.pretrained import load_whole, only_errors_from_transformers
from align.modeling.score_head import draw_head, head_name, read_at_end_token
from align.modeling.types import Model

logger = logging.getLogger(__name__)


def load_merged(auto_class, folder: str, options: dict, **head) -> Model:
    """The model that an adapter's folder stands for, trainable, with `adapter_start` set. head: as for `load_whole`."""
    if head and task_of(folder) != "SEQ_CLS":  # an adapter of a language model under a new head
        return _grafted(folder, options, head["head_seed"])
    adapted, base = load_unmerged(auto_class, folder, options, **head)
    logger.info("%s holds an adapter of %s: it is merged into it", folder, base)
    probes = _weights_before(adapted)
    model = merge(adapted)
    _warn_of_rounding(folder, probes)
    for parameter in model.parameters():  # PEFT froze them under the adapter
        parameter.requires_grad_(parameter.is_floating_point())
    model.adapter_start = read_start(folder, base)
    return model


def load_unmerged(auto_class, folder: str, options: dict, **head) -> tuple[Model, str]:
    """(the PEFT model of an adapter's folder, its base's folder or name). head: as for `load_whole`."""
    from peft import PeftModel

    base = adapter_base(folder)
    load = load_merged if is_adapter(base) else load_whole
    if not head:
        check_answers(folder)
    with only_errors_from_transformers():  # a head that the base lacks is the adapter's
        model = load(auto_class, base, options, **({"head_seed": 0, "of_adapter": True} if head else {}))
        fill(model)  # the adapter is added to it
        fit_base(model, folder)
        try:
            adapted = PeftModel.from_pretrained(model, folder)
        except Exception as error:  # damaged files make PEFT and safetensors raise anything
            reason = one_line(error)
            raise ConfigError(f"cannot load the adapter {folder!r} on its base {base!r}: {reason}") from error
    if head and notes(folder):  # an adapter has no config of its own that could say it; ours are `RewardTrainer`'s
        read_at_end_token(model)
    return adapted, base


def merge(adapted: Any) -> Model:
    """The plain model of a PEFT model. Input and output embeddings that share a weight are parted first where one of
    them is adapted: PEFT adds the update to the shared weight, and so to both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_mergeable(adapted)
    core = adapted.get_base_model()
    ends = core.get_input_embeddings(), core.get_output_embeddings()
    layers = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    adapted_ends = [isinstance(end, BaseTunerLayer) for end in ends]
    if any(adapted_ends) and None not in ends and layers[0].weight is layers[1].weight:
        layers[1].weight = nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)
        core.config.get_text_config().tie_word_embeddings = core.config.tie_word_embeddings = False
    return adapted.merge_and_unload()


def _grafted(folder: str, options: dict, head_seed: int | None) -> nn.Module:
    """A classifier on the merged trunk of a language model's adapter, its head drawn with head_seed."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if head_seed is None:
        raise ConfigError(f"{folder} is no reward model: it is the adapter of a language model")
    options = {key: value for key, value in options.items() if key != "num_labels"}
    policy = load_merged(AutoModelForCausalLM, folder, options)
    config = policy.config
    config.num_labels, config.architectures = 1, None
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            copy.deepcopy(config), dtype=policy.dtype, attn_implementation=config._attn_implementation
        )
    setattr(model, model.base_model_prefix, policy.base_model)
    model.config = config  # that of the trunk's layers, which read in it which attention they compute
    name = head_name(model)
    head = model.get_submodule(name).to_empty(device=policy.device)
    draw_head(head, head_seed)
    model.adapter_start = policy.adapter_start
    model.generation_config = None
    return model


def _weights_before(adapted: nn.Module) -> list[tuple[nn.Linear, Tensor, Tensor]]:
    """Of at most four adapted layers: the plain layer, its weight before the merge, and what the merge should add."""
    from peft.tuners.lora import LoraLayer

    layers = [m for m in adapted.modules() if isinstance(m, LoraLayer) and isinstance(m.get_base_layer(), nn.Linear)]
    return [
        (layer.get_base_layer(), layer.get_base_layer().weight.detach().clone(), layer.get_delta_weight("default"))
        for layer in layers[:: max(len(layers) // 4, 1)][:4]
        if layer.get_base_layer().weight.dtype in (torch.float16, torch.bfloat16)
    ]


def _warn_of_rounding(folder: str, probes: list[tuple[nn.Linear, Tensor, Tensor]]) -> None:
    """16-bit weights round small updates away: say how much of the adapter has arrived."""
    wanted = sum(delta.float().square().sum().item() for _, _, delta in probes)
    if wanted:
        got = sum(((m.weight - before).float() * delta.float()).sum().item() for m, before, delta in probes)
        if got / wanted < 0.95:
            logger.warning(
                "%.0f %% of the adapter %s arrive in the %s weights that it is merged into, the rest is rounded away: "
                "load the model in float32 (dtype: float32)",
                100 * got / wanted,
                folder,
                str(probes[0][1].dtype).removeprefix("torch."),
            )
