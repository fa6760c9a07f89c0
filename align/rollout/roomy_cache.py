"""A key-value cache of transformers that is not copied for every token."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` with room for more tokens at its end, so that most tokens are written in place.

    transformers' own layer joins the old keys and values with the new ones, a copy of all of them for every token: a
    quarter of the time of a model of 5 million parameters. `keys` and `values` are views of `held`, without the room.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.keys, self.values, self.held = layer.keys, layer.values, (layer.keys, layer.values)
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.held[0].shape[-2]:
            self.held = (with_room(self.keys, end + ROOM), with_room(self.values, end + ROOM))
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[..., start:end, :] = new
        self.keys, self.values = (held[..., :end, :] for held in self.held)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        length = self.get_seq_length()
        self.held = tuple(held[beam_idx] for held in self.held)
        self.keys, self.values = (held[..., :length, :] for held in self.held)


def with_room(old: Tensor, length: int) -> Tensor:
    """old [B, H, T, D] at the start of an uninitialised [B, H, length, D]."""
    new = torch.empty(*old.shape[:-2], length, old.shape[-1], dtype=old.dtype, device=old.device)
    new[..., : old.shape[-2], :] = old
    return new


def give_room(cache: Cache) -> None:
    """Replace the layers that hold everything; others (sliding windows, recurrent states) do not grow."""
    cache.layers = [
        RoomyLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer for layer in cache.layers
    ]


def pick_rows(cache: Cache, index: Tensor) -> None:
    """Keep the rows of `index` [rows], of any length, in place."""
    if "batch_select_indices" in vars(type(cache)):  # MiniMax holds its states beside the layers
        cache.batch_select_indices(index)
    else:
        cache.reorder_cache(index)  # layers with states have no other choice of rows
