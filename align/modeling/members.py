"""Several reward models in one: a shared lower trunk, and per member its own upper layers and head.

The model stays the transformers model that it was. From some layer on its modules are replaced by `Members`, and the
rows of the batch are multiplied: B rows become K * B, member 0's first. Whatever the architecture does around its
layers (masks, positions, gradient checkpointing) is thus its own code. The heads' scores end up side by side, so that
the model looks like a classifier with K outputs.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import ConfigError
from align.modeling.score_head import draw_head, head_name
from align.modeling.scores import sequence_scores
from align.modeling.types import Model


class Members(nn.Module):
    """K copies of a module, copy k for the k-th of K equal parts of the rows.

    first: the rows are not multiplied yet; every copy sees all of them. last: the copies' outputs become columns of the
    last dimension, [B, ..., K], and the rows are B again.
    """

    def __init__(self, module: nn.Module, count: int, *, first: bool = False, last: bool = False):
        super().__init__()
        self.members = nn.ModuleList([module, *(copy.deepcopy(module) for _ in range(count - 1))])
        self.first, self.last = first, last

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        count = len(self.members)
        parts = [hidden] * count if self.first else hidden.chunk(count)
        outputs = (member(part, *args, **kwargs) for member, part in zip(self.members, parts, strict=True))
        if self.last:
            return torch.cat(list(outputs), dim=-1)
        return torch.cat(list(outputs)) if torch.is_grad_enabled() else self._filled(outputs, hidden)

    def _filled(self, outputs: Iterable[Tensor], hidden: Tensor) -> Tensor:
        """As torch.cat, without holding the outputs twice: the input of all but the first is overwritten."""
        whole: Any = None if self.first else hidden.contiguous().view(len(self.members), -1, *hidden.shape[1:])
        for i, output in enumerate(outputs):
            if whole is None or whole[i].shape != output.shape or whole.dtype != output.dtype:
                whole = output.new_empty(len(self.members), *output.shape)
            whole[i] = output
        return whole.flatten(0, 1)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a model reads off its layers, such as the kind of attention
            if name == "members":
                raise
            return getattr(self.members[0], name)


def member_scores(model: Model, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
    """Scores [K, B] of every member, as `sequence_scores`."""
    return sequence_scores(model, input_ids, attention_mask).view(-1, count).T


def share_trunk(model: Model, seeds: list[int], upper_layers: int, *, train_trunk: bool = False) -> Model:
    """Make a classifier hold one member per seed: the upper `upper_layers` layers and all that follows them are copied.

    Every member's head is drawn anew with its seed; all else starts as it was. Without `train_trunk` what the members
    share is frozen. Changes the model in place. Raises `ConfigError` for an architecture without one list of layers.
    """
    copy_upper(model, len(seeds), upper_layers)
    draw_heads(model, seeds)
    if not train_trunk:
        freeze_all_but_members(model)
    return model


def copy_upper(model: Model, count: int, upper_layers: int) -> None:
    """Replace the upper layers and what follows them by `count` copies, in place."""
    layers = layer_list(model)
    if not 1 <= upper_layers < len(layers):
        raise ConfigError(
            f"{type(model).__name__} has {len(layers)} layers: each member can have 1 to {len(layers) - 1} upper "
            f"layers of its own, got {upper_layers}"
        )
    own = modules_after(model, layers)  # found before anything is replaced
    split = len(layers) - upper_layers
    for index in range(split, len(layers)):
        layers[index] = Members(layers[index], count, first=index == split)
    for name in own:
        model.set_submodule(name, Members(model.get_submodule(name), count, last=name == own[-1]))
    model.config.get_text_config().use_cache = False  # the members' layers of one index would write to one cache


def draw_heads(model: Model, seeds: list[int]) -> None:
    """A new head for every member, each with its seed."""
    head = model.get_submodule(head_name(model).split(".")[0])
    for member, seed in zip(head.members, seeds, strict=True):
        draw_head(member if isinstance(member, nn.Linear) else member.get_submodule(head_name(member)), seed)


def freeze_all_but_members(model: Model) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Members):
            module.requires_grad_(True)


def member_state(state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Of the state dict of a shared trunk: one member's weights and the shared ones, under the names that a classifier
    without members has."""
    own = {}
    for name, value in state.items():
        outer, found, inner = name.partition(".members.")
        number, _, rest = inner.partition(".")
        if not found or int(number) == index:
            own[f"{outer}.{rest}" if found else name] = value
    return own


# ---- where the layers are -------------------------------------------------------------------------------------------


def layer_list(model: Model) -> nn.ModuleList:
    """The list of transformer layers: the outermost module list with as many entries of one class as the config says.

    Raises `ConfigError` where there is none or more than one (encoder-decoders, layers that share weights).
    """
    config = model.config.get_text_config()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        and len({type(layer) for layer in module}) == 1
    }
    outermost = [m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1 or model.config.is_encoder_decoder:
        raise ConfigError(
            f"{type(model).__name__} has no single list of {config.num_hidden_layers} layers to share a trunk of: "
            "use separate members"
        )
    return outermost[0]


@torch.no_grad()
def modules_after(model: Model, layers: nn.ModuleList) -> list[str]:
    """Names of the outermost modules with parameters that run after the last layer (final norm, pooler, head)."""
    ran, outputs = [], []

    def after_layers(module, args, output):
        outputs.append(output)

    hooks = [layers[-1].register_forward_hook(after_layers)]
    for name, module in model.named_modules():
        if any(True for _ in module.parameters()):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: ran.append(name) if outputs else None))
    training = model.training
    model.eval()
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        raise ConfigError(f"the layers of {type(model).__name__} do not return one tensor each: use separate members")
    return [name for name in ran if not any(name.startswith(f"{other}.") for other in ran)]
