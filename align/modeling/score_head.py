"""The linear layer that makes a reward model's one score."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from align.distributed.shards import gathered
from align.errors import ConfigError
from align.modeling.types import Model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

READ_AT = "score_read_at"  # in the config of a model: "end_token" where `RewardTrainer` trained it


def read_at_end_token(model: Model) -> None:
    """Mark a reward model as one whose score is trained, and so read, at the end token of an answer."""
    setattr(model.config, READ_AT, "end_token")


def reads_end_token(config: "PretrainedConfig") -> bool:
    """Whether the score of the model with this config was trained at the end token, rather than at the end of the whole
    chat template."""
    return config.to_dict().get(READ_AT) == "end_token"


def head_name(model: Model) -> str:
    """Name of the linear layer that makes the one score."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer with one output, and reward models require `num_labels=1`: "
            "load it with that"
        )
    return names[-1]


def draw_head(head: nn.Linear, seed: int) -> None:
    """Weights from N(0, 1/(d+1)), d the input width (Stiennon et al. 2020), bias 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.out_features, head.in_features, generator=generator) / (head.in_features + 1) ** 0.5
    with gathered(head.parameters(), written=True), torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()
