"""The mask networks in a training run: made, given to the optimiser, kept apart from the policy's weights."""

from pathlib import Path

import torch
from torch import Tensor, nn

from align.modeling.token_masks import MaskSettings, TokenMasks, describe_masks, save_masks
from align.modeling.types import Model
from align.trainers.masks.options import MaskOptions

PREFIX = "token_masks"  # the submodule of the policy that holds the networks


def new_masks(options: MaskOptions, reference: Model, seed: int) -> TokenMasks:
    """The networks for the hidden states of `reference`. options: of a learned variant, which have their defaults."""
    assert options.mask_layers and options.mask_init and options.mask_dropout is not None
    config = reference.config.get_text_config()
    settings = MaskSettings(
        variant=options.variant,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        layers=options.mask_layers,
        mlp_size=options.mask_mlp_size,
        dropout=options.mask_dropout,
        on_reward=options.mask_on_reward,
        on_kl=options.mask_on_kl,
    )
    masks = TokenMasks(settings).initialise(options.mask_init, seed)
    return masks.double() if reference.dtype == torch.float64 else masks


def separate_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, weight_decay: float, learning_rate: float | None
) -> None:
    """Move the networks' parameters into two groups of their own: weights, which decay by `weight_decay`, and biases
    and norms. learning_rate: None is that of the optimiser."""
    named = [(n, p) for n, p in model.named_parameters() if f"{PREFIX}." in n]
    mine = {id(p) for _, p in named}
    if all(len({id(p) in mine for p in group["params"]}) < 2 for group in optimizer.param_groups):
        return  # by an earlier call of `train`
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in mine]
    shared = {} if learning_rate is None else {"lr": learning_rate}
    for decays, decay in ((True, weight_decay), (False, 0.0)):
        params = [p for n, p in named if (n.endswith(".weight") and ".norm." not in n) == decays]
        optimizer.add_param_group({"params": params, "weight_decay": decay, **shared})


def policy_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights without those of the networks."""
    return {name: value for name, value in state.items() if not name.startswith(f"{PREFIX}.")}


def write_masks(folder: Path, options: MaskOptions, masks: TokenMasks | None, state: dict, reference: str) -> None:
    """The file of the weights of tokens. state: the model's weights; reference: where the reference was loaded from."""
    start = f"{PREFIX}."
    weights = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    if masks is not None:
        description = describe_masks(masks.settings, reference)
    else:
        description = {
            "variant": "mapo",
            "activations": options.mask_activations,
            "on_reward": options.mask_on_reward,
            "on_kl": options.mask_on_kl,
            "reference": reference,
        }
    save_masks(folder, description, weights)
