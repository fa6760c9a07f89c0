"""MaPO's masks: how active the frozen reference is at a token. No parameters, nothing to train.

Every watched activation [rows, T, features] is averaged over its features in float32, min-max scaled to [0, 1] over the
tokens of each completion, and averaged within its group; the groups are averaged. (The authors standardise before the
min-max, which changes nothing, and round the statistics to float16, which does.)
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import ConfigError
from align.modeling.pairs import Completions, at_completions
from align.modeling.token_masks import decoder_layers, first_of
from align.modeling.types import Model

GROUPS = ("mlp", "attn", "resid", "logits")


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps what is watched: paths from a layer, and the final norm's from the model."""

    attention: str
    attention_out: str
    mlp: str
    mlp_out: str
    norm_attention: str
    norm_mlp: str
    final_norm: str
    projections: tuple[str, ...]  # of query, key and value; one name where one layer makes all three


_LLAMA = Names(
    attention="self_attn",
    attention_out="self_attn.o_proj",
    mlp="mlp",
    mlp_out="mlp.down_proj",
    norm_attention="input_layernorm",
    norm_mlp="post_attention_layernorm",
    final_norm="model.norm",
    projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gpt_neox": Names(
        attention="attention",
        attention_out="attention.dense",
        mlp="mlp",
        mlp_out="mlp.dense_4h_to_h",
        norm_attention="input_layernorm",
        norm_mlp="post_attention_layernorm",
        final_norm="gpt_neox.final_layer_norm",
        projections=("attention.query_key_value",),
    ),
    "gpt2": Names(
        attention="attn",
        attention_out="attn.c_proj",
        mlp="mlp",
        mlp_out="mlp.c_proj",
        norm_attention="ln_1",
        norm_mlp="ln_2",
        final_norm="transformer.ln_f",
        projections=("attn.c_attn",),
    ),
}


def architecture(core: Model) -> Names:
    """The names for a model; ConfigError for an architecture that is not known."""
    kind = core.config.model_type
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"MaPO's activation masks are not known for the architecture {kind!r} ({type(core).__name__}); they are "
            f"for {', '.join(ARCHITECTURES)}. Use a learned mask (variant: common or independent), which takes any"
        )
    return ARCHITECTURES[kind]


def groups_of(wanted: str) -> tuple[str, ...]:
    """`all` or one group's name, as the groups; ConfigError otherwise."""
    if wanted == "all":
        return GROUPS
    if wanted not in GROUPS:
        raise ConfigError(f"there are no activations {wanted!r}; they are all, {', '.join(GROUPS)}")
    return (wanted,)


def min_max(values: Tensor, mask: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """Values scaled to [0, 1] over the tokens of each row; 0 outside the mask. values, mask: [N, L].

    Where all tokens of a row are equal up to `noise` (or it has one), none is more active than the others: all get 1.
    """
    mask = mask.bool()
    low = values.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    spread = high - low
    scaled = torch.where(spread > noise, (values - low) / spread.where(spread > noise, 1), 1)
    return scaled.masked_fill(~mask, 0)


class Activations:
    """Running means of the scaled activations, by group."""

    def __init__(self, positions: Completions):
        self.positions = positions
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def forget(self) -> None:
        self.sums.clear()
        self.counts.clear()

    def see(self, group: str, x: Tensor) -> None:
        """One activation, [rows, T, features]."""
        self.add(group, mean(x), rounding(x))

    def add(self, group: str, means: Tensor, noise: Tensor) -> None:
        """One activation's mean over its features, [rows, T]."""
        scaled = min_max(at_completions(means, self.positions), self.positions.mask, noise)
        self.sums[group] = self.sums[group] + scaled if group in self.sums else scaled
        self.counts[group] = self.counts.get(group, 0) + 1

    def mask(self) -> Tensor:
        """The mean of the groups' means, [2B, L]."""
        return reduce(add, (total / self.counts[group] for group, total in self.sums.items())) / len(self.sums)


@contextmanager
def watch_activations(core: Model, positions: Completions, groups: tuple[str, ...] = GROUPS):
    """An `Activations` that has seen everything in `groups` after a forward pass of `core` inside.

    mlp: what enters the second linear layer. attn: query, key and value, query and key after the rotation (where there
    is one), and what enters the output projection. resid: the stream after the embedding, after each attention and each
    MLP block, what the blocks add, and what the norms make of it. logits: over the vocabulary.
    """
    names, seen = architecture(core), Activations(positions)
    hooks = [core.base_model.register_forward_pre_hook(lambda module, args: seen.forget())]
    if "mlp" in groups:
        for block in decoder_layers(core):
            hooks.append(_on_input(block.get_submodule(names.mlp_out), lambda x: seen.see("mlp", x)))
    if "attn" in groups:
        for block in decoder_layers(core):
            hooks += _watch_attention(block, names, seen)
    if "resid" in groups:
        for number, block in enumerate(decoder_layers(core)):
            hooks += _watch_stream(block, names, seen, first=number == 0)
        hooks.append(_on_output(core.get_submodule(names.final_norm), lambda x: seen.see("resid", x)))
    if "logits" in groups:
        hooks.append(_watch_logits(core, seen))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def mean(x: Tensor) -> Tensor:
    """Over the last dimension, in float32 or better."""
    return x.mean(-1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def rounding(x: Tensor) -> Tensor:
    """How far means over the last dimension may differ by rounding alone. A LayerNorm without a trained gain has means
    that are nothing else, and min-max would blow them up."""
    return 8 * torch.finfo(x.dtype).eps * x.abs().mean() / x.shape[-1] ** 0.5


def _on_output(module: nn.Module, see):
    return module.register_forward_hook(lambda module, args, output: see(first_of(output)))


def _on_input(module: nn.Module, see):
    return module.register_forward_pre_hook(lambda module, args: see(args[0]))


def _watch_stream(block: nn.Module, names: Names, seen: Activations, first: bool) -> list:
    """Means are linear: the stream after a block is the stream before it plus what the block adds."""
    stream = {}

    def enter(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        stream["means"], stream["noise"] = mean(x), rounding(x)
        if first:
            seen.add("resid", **stream)  # the embedding
        seen.add("resid", **stream)  # what enters the layer

    def added(x):
        delta, noise = mean(x), rounding(x)
        stream["means"], stream["noise"] = stream["means"] + delta, stream["noise"] + noise
        seen.add("resid", delta, noise)
        seen.add("resid", **stream)

    return [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        _on_output(block.get_submodule(names.norm_attention), lambda x: seen.see("resid", x)),
        _on_output(block.get_submodule(names.attention), added),
        _on_output(block.get_submodule(names.norm_mlp), lambda x: seen.see("resid", x)),
        _on_output(block.get_submodule(names.mlp), added),
    ]


def _watch_attention(block: nn.Module, names: Names, seen: Activations) -> list:
    attention, parts = block.get_submodule(names.attention), dict(block.named_modules())
    kept: list[Tensor] = []

    def enter_out(x):  # what the heads make of the values, side by side
        seen.see("attn", x)

    def leave(module, args, kwargs, output):
        query, key, value = _heads(kept, module, names)
        kept.clear()
        for x in (query, key, value):
            seen.see("attn", x.flatten(-2))
        if "position_embeddings" in kwargs:
            rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
            for x in rotate(query, key, *kwargs["position_embeddings"], unsqueeze_dim=2):
                seen.see("attn", x.flatten(-2))

    hooks = []
    for name in names.projections:
        normed = name.replace("_proj", "_norm")  # Qwen3 norms query and key by head
        source = normed if normed in parts else name
        hooks.append(_on_output(parts[source], kept.append))
    hooks.append(_on_input(block.get_submodule(names.attention_out), enter_out))
    hooks.append(attention.register_forward_hook(leave, with_kwargs=True))
    return hooks


def _heads(kept: list[Tensor], attention: Any, names: Names) -> list[Tensor]:
    """Query, key and value, [rows, T, heads, size] each, from what the projections returned."""
    if len(kept) == 3:
        return [x if x.dim() == 4 else x.unflatten(-1, (-1, attention.head_dim)) for x in kept]
    (joint,) = kept
    if names is ARCHITECTURES["gpt_neox"]:  # head by head: its query, its key, its value
        return list(joint.unflatten(-1, (-1, 3 * attention.head_size)).chunk(3, dim=-1))
    return [x.unflatten(-1, (attention.num_heads, -1)) for x in joint.chunk(3, dim=-1)]


def _watch_logits(core: Model, seen: Activations):
    """The mean logit is the hidden state times the mean row of the head: the logits themselves are not needed."""

    def see(hidden):
        weight = core.get_output_embeddings().weight
        if weight.numel() == 0:
            raise ConfigError(
                "the logits' activations cannot be read under DeepSpeed ZeRO-3, which takes the head's weights apart: "
                "use mask_activations mlp, attn or resid, or ZeRO-2"
            )
        weight = weight.to(torch.promote_types(hidden.dtype, torch.float32))
        seen.add("logits", hidden.to(weight.dtype) @ weight.mean(0), rounding(hidden) * weight.abs().mean())

    return _on_output(core.base_model, see)
