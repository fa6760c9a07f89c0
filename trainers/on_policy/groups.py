"""What estimators share that compare a prompt's samples with each other."""

from torch import Tensor

from align.errors import ConfigError
from align.objectives.kl import masked_sum
from align.trainers.on_policy.streams import Stream


def penalised(stream: Stream) -> Tensor:
    """score - beta * sum_t k1, [N]."""
    return stream.scores - stream.beta * masked_sum(stream.logps - stream.ref_logps, stream.mask)


def needs_groups(num_generations: int) -> None:
    """Raises `ConfigError` when a prompt has too few samples for a baseline of its own."""
    if num_generations < 2:
        raise ConfigError(
            f"num_generations is {num_generations}: a baseline of the prompt's own samples needs at least 2. "
            "ReMax works with one"
        )
