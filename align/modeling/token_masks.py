"""Mask networks of SparsePO: a weight >= 0 per token from the frozen reference's hidden states.

A network reads the state before each completion token (after every layer, or after the last one) and ends in a ReLU,
which is where exact zeros come from; nothing bounds a weight from above. `watch_states` gathers the states while the
reference runs, at the completion positions only.
"""

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.distributed.disk import open_to_others
from align.errors import ConfigError, DataError
from align.modeling.members import layer_list
from align.modeling.pairs import Completions
from align.modeling.types import Model

FILE_NAME = "token_masks.safetensors"
INITS = ("unit", "released")
UNIT_MEAN = 1.0833  # of ReLU(1 + N(0, 1))


@dataclass(frozen=True)
class MaskSettings:
    """What a set of mask networks is.

    variant: `common` (one network for both terms) or `independent` (one each). layers: `all` (a value per transformer
    layer, mixed by a bias-free linear layer; one LayerNorm is shared) or `last` (the state that the head reads).
    mlp_size: width of a linear layer in between (the authors' `ml_` variants: 200); None is one linear layer.
    on_reward, on_kl: which terms are masked. hidden_size, num_layers: of the reference.
    """

    variant: str
    hidden_size: int
    num_layers: int
    layers: str = "all"
    mlp_size: int | None = None
    dropout: float = 0.0
    on_reward: bool = True
    on_kl: bool = True


class TokenMask(nn.Module):
    """One network: hidden states to weights.

    `all`:  m = ReLU( sum_l a_l ReLU( w_l . LayerNorm(h_l) + b_l ) ), dropout after each ReLU
    `last`: m = ReLU( w . h_L + b ), dropout after it
    With `mlp_size` w_l is a product of two linear layers with dropout between them and, as released, no activation.
    """

    def __init__(self, settings: MaskSettings):
        super().__init__()
        count = settings.num_layers if settings.layers == "all" else 1
        width = settings.mlp_size or 1
        self.first = nn.ModuleList(nn.Linear(settings.hidden_size, width) for _ in range(count))
        self.second = nn.ModuleList(nn.Linear(width, 1) for _ in range(count if settings.mlp_size else 0))
        self.norm = nn.LayerNorm(settings.hidden_size) if settings.layers == "all" else None
        self.mixer = nn.Linear(count, 1, bias=False) if settings.layers == "all" else None
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, states: list[Tensor]) -> Tensor:
        """Weights [...] of states [..., d] per layer: standardised ones (see `standardise`) for `all`, the last for
        `last`. float32 (float64 for a float64 network), also under autocast."""
        values = torch.cat([self._layer(layer, h) for layer, h in enumerate(states)], dim=-1)
        if self.mixer is not None:
            values = self.dropout(F.relu(self.mixer(values)))
        weights = values.squeeze(-1)
        return weights if weights.dtype == torch.float64 else weights.float()

    def _layer(self, layer: int, h: Tensor) -> Tensor:
        first = self.first[layer]
        weight: Tensor = first.get_parameter("weight")
        bias: Tensor = first.get_parameter("bias")
        if self.norm is not None:
            # LayerNorm's gain and shift are folded in, so that the backward pass keeps one copy of the standardised
            # state, which both networks share, and not one per network and operation
            weight, bias = weight * self.norm.weight, bias + weight @ self.norm.bias
        value = F.linear(h, weight.to(h.dtype), bias.to(h.dtype)).to(weight.dtype)
        if self.second:
            value = self.second[layer](self.dropout(value))
        return self.dropout(F.relu(value))

    @torch.no_grad()
    def initialise(self, init: str, generator: torch.Generator) -> None:
        """Draw the weights.

        unit: every layer's value is about ReLU(1 + N(0, 1)) and the mixer is their mean, scaled so that m starts near
            1, as TDPO1, and can go either way. With a smaller spread tokens differ so little that a mask that shrinks
            reaches 0 at all of them at once.
        released: transformers' N(0, 0.02^2) and zero biases, as the authors start. m is then 0 for a third to four
            fifths of the tokens and about 0.01 for the others: the loss starts nearly flat.
        """
        for layer, first in enumerate(self.first):
            linears: list[Any] = [first, self.second[layer]] if self.second else [first]
            for linear in linears:
                spread = 0.02 if init == "released" else linear.in_features**-0.5
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * spread)
                linear.bias.zero_()
            if init == "unit":
                linears[-1].bias.fill_(1.0)
            if init == "unit" and self.mixer is None:
                linears[-1].weight.div_(UNIT_MEAN)
                linears[-1].bias.div_(UNIT_MEAN)
        if self.mixer is not None:
            drawn = torch.randn(self.mixer.weight.shape, generator=generator) * 0.02
            average = torch.full_like(drawn, 1 / (UNIT_MEAN * drawn.shape[-1]))
            self.mixer.weight.copy_(drawn if init == "released" else average)


class TokenMasks(nn.Module):
    """The networks of both terms: states to (m_u, m_d), None for a term that is not masked."""

    def __init__(self, settings: MaskSettings):
        super().__init__()
        self.settings = settings
        names = ("common",) if settings.variant == "common" else ("reward", "kl")
        self.networks = nn.ModuleDict({name: TokenMask(settings) for name in names})

    def initialise(self, init: str, seed: int) -> "TokenMasks":
        """Draw all networks with one seed; returns self."""
        generator = torch.Generator().manual_seed(seed)
        for network in self.networks.values():
            cast(TokenMask, network).initialise(init, generator)
        return self

    def forward(self, states: list[Tensor], mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weights [2B, L], 0 outside of mask [2B, L]; states of its N tokens as `watch_states` gathers them."""
        weights = {name: on_rows(network(states), mask) for name, network in self.networks.items()}
        reward, kl = (weights.get(name, weights.get("common")) for name in ("reward", "kl"))
        return (reward if self.settings.on_reward else None), (kl if self.settings.on_kl else None)


def on_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Values [N] of the tokens in mask [2B, L], put in their places; 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def standardise(h: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm without gain and shift over the last dimension; in the precision that matrix products run in."""
    kind = h.device.type
    exact = h if h.dtype == torch.float64 else h.float()
    result = F.layer_norm(exact, exact.shape[-1:], eps=eps)
    return result.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype)


# ---- the reference's states ------------------------------------------------------------------------------------------


@contextmanager
def watch_states(core: Model, positions: Completions, layers: str = "all"):
    """A list that holds, after a forward pass of `core` inside, what `TokenMasks` reads for the N completion tokens of
    the batch: [N, d] per layer. The states are transformers' `hidden_states[1:]` before each token, the last one after
    the final norm; standardised for `all` layers, as it is for the `last`. Nothing else of them is kept.

    core: a transformers model with a head (see `language_model`). Raises ConfigError for a model whose layers cannot
    be found.
    """
    states: list[Tensor] = []
    sources = positions.sources[positions.mask]
    blocks = list(decoder_layers(core))[:-1] if layers == "all" else []

    def keep(module, args, output):
        h = first_of(output).detach().flatten(0, 1)[sources]
        states.append(standardise(h) if layers == "all" else h)

    # the body's output is the last state after the final norm; the head is left alone, as its products are tiled
    hooks = [module.register_forward_hook(keep) for module in (*blocks, core.base_model)]
    hooks.append(core.base_model.register_forward_pre_hook(lambda module, args: states.clear()))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def decoder_layers(core: Model) -> nn.ModuleList:
    """The transformer layers of a model. Raises ConfigError where they cannot be told."""
    try:
        return layer_list(core)
    except ConfigError as error:
        raise ConfigError(
            f"the hidden states of {type(core).__name__} cannot be read: it has no single list of "
            f"{core.config.get_text_config().num_hidden_layers} layers. mask_layers: last needs the last one only"
        ) from error


def first_of(output) -> Tensor:
    """The tensor of a module that may return several things, the tensor first."""
    return output if isinstance(output, Tensor) else output[0]


# ---- files -----------------------------------------------------------------------------------------------------------


def save_masks(folder: str | Path, description: dict, weights: dict[str, Tensor]) -> Path:
    """Write token_masks.safetensors: the networks' weights (none for activation masks), and what they are as metadata.

    description: plain values (see `describe_masks`).
    """
    from safetensors.torch import save_file

    path = Path(folder) / FILE_NAME
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, path, metadata={"format": "pt", "align": json.dumps(description)})
    open_to_others(path.parent)
    return path


def describe_masks(settings: MaskSettings, reference: str) -> dict:
    return {**asdict(settings), "reference": reference}


def read_masks(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """(description, weights) of a folder's mask file. Raises DataError where there is none, or not one of ours."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE_NAME
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["align"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no token masks ({FILE_NAME} is missing)") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged or was not written by align: {error}") from error


def load_masks(folder: str | Path) -> tuple[TokenMasks, str]:
    """Trained mask networks in eval mode, and the name of the reference whose states they read."""
    description, weights = read_masks(folder)
    reference = description.pop("reference")
    masks = TokenMasks(MaskSettings(**description))
    masks.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return masks.eval(), reference
