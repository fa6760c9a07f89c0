"""Reward models on some ranks of a run alone, which score the completions of all."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from align.errors import AlignError, ConfigError, RewardError, one_line
from align.modeling.elsewhere import Elsewhere
from align.modeling.fingerprint import model_mark
from align.modeling.types import Model
from align.reward_models.steps import RankLost, on_all_ranks


@dataclass(frozen=True)
class Asked:
    """A batch for the model. inputs: what it reads. tokens: their number, padding counted. rows: what an error calls
    them."""

    inputs: list
    tokens: int
    rows: str


class Placement:
    """Where the models of a reward are. All ranks of the run must make the same calls of it, in the same order.

    Args:
        name: of the reward, for errors.
        ranks: that hold the models. Raises `ConfigError` for some that the run does not have.
    """

    def __init__(self, name: str, ranks: Sequence[int]):
        world = dist.get_world_size() if dist.is_initialized() else 1
        beyond = [rank for rank in ranks if rank >= world]
        if beyond:
            count = "is 1 process, rank 0" if world == 1 else f"has {world} processes, ranks 0 to {world - 1}"
            raise ConfigError(
                f"reward {name!r}: ranks places its model on rank {beyond[0]}, and this run {count}: name others, "
                "leave ranks out, or start more processes (align launch CONFIG --num-processes N). In a program of "
                "your own, make the trainer's config before the reward: it connects the processes"
            )
        _check_loading(name)
        self.name, self.ranks = name, list(ranks)
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    @classmethod
    def of(cls, name: str, ranks: Sequence[int] | None) -> "Placement | None":
        """None where every process holds the models; one process is every process."""
        placement = None if ranks is None else cls(name, ranks)
        return placement if dist.is_initialized() and dist.get_world_size() > 1 else None

    @property
    def here(self) -> bool:
        return self.rank in self.ranks

    def load(self, load: Callable[[], list[Model]], known: Callable[[list[Model]], Any]) -> tuple[list, Any]:
        """The models that `load` loads on the ranks that hold them, elsewhere `Elsewhere` in their place, and what
        `known` finds out about them there. A failure is raised on all ranks."""

        def loaded() -> tuple[list[Model], Any]:
            if not self.here:
                return [], None
            try:
                models = load()
                return models, ([Elsewhere(model_mark(model)) for model in models], known(models))
            except AlignError:
                raise
            except Exception as error:  # no memory left, say: the other ranks would wait for this one
                raise RewardError(f"reward {self.name!r} cannot be loaded: {one_line(error)}") from error

        models, facts = on_all_ranks(loaded)
        elsewhere, found = _gathered(facts, self.name)[self.ranks[0]]
        return (models if self.here else elsewhere), found

    def ask(self, batches: list[Asked]) -> list[tuple[tuple[int, int], Asked]]:
        """What this rank is to compute, of all that the ranks ask for: ((rank that asks, its number there), batch)."""
        asked: list[list[Asked]] = _gathered(batches, self.name)
        given = shared_out([[batch.tokens for batch in of_rank] for of_rank in asked], len(self.ranks))
        own = given[self.ranks.index(self.rank)] if self.here else []
        return [(place, asked[place[0]][place[1]]) for place in own]

    def compute(
        self,
        asked: list[tuple[tuple[int, int], Asked]],
        forward: Callable[[list], Tensor],
        ready: Callable[[], AbstractContextManager],
    ) -> dict[tuple[int, int], list]:
        """The numbers of each batch. forward: of the model, [b] or [b, K] of b inputs. ready: while it computes."""
        if not asked:
            return {}
        doing = ""
        try:
            with ready():
                parts = []
                for (rank, _), batch in asked:
                    doing = f", {batch.rows} of rank {rank}"
                    parts.append(forward(batch.inputs))
                numbers = torch.cat(parts).double().cpu()  # once: a GPU works on one while the next is put together
        except Exception as error:  # no memory left, say: the other ranks would wait for this one
            raise RewardError(f"reward {self.name!r}{doing}: {one_line(error)}") from error
        sizes = [len(batch.inputs) for _, batch in asked]
        return {place: part.tolist() for (place, _), part in zip(asked, numbers.split(sizes), strict=True)}

    def answers(self, computed: dict[tuple[int, int], list], count: int) -> Tensor:
        """The numbers for the `count` batches that this rank has asked for, one batch after the other, float64."""
        of_all = {place: numbers for part in _gathered(computed, self.name) for place, numbers in part.items()}
        found = [number for batch in range(count) for number in of_all[self.rank, batch]]
        return torch.tensor(found, dtype=torch.float64)


def _gathered(value: Any, name: str) -> list:
    """The values of all ranks, in order. name: of the reward."""
    values: list = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except Exception as error:
        raise RankLost(f"reward {name!r}", error) from error
    return values


def _check_loading(name: str) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            f"reward {name!r}: ranks have not been tried with ZeRO-3: use --setup fsdp2 or zero2, or serve the reward "
            "(docs/rewards.md, type: remote)"
        )


def shared_out(tokens: list[list[int]], shares: int) -> list[list[tuple[int, int]]]:
    """Batches as (rank, number there) in so many shares of about as many tokens: each batch, the largest first, goes to
    the share with the fewest so far. tokens: of the batches of every rank."""
    places = [(rank, number) for rank, own in enumerate(tokens) for number in range(len(own))]
    found: list[list[tuple[int, int]]] = [[] for _ in range(shares)]
    sums = [0] * shares
    for rank, number in sorted(places, key=lambda place: -tokens[place[0]][place[1]]):
        share = sums.index(min(sums))
        found[share].append((rank, number))
        sums[share] += tokens[rank][number]
    return found
