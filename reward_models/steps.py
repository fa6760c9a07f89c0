"""Scoring in steps that all ranks of a run take together, where a reward's model is on some of them alone.

1. Completions become what the models read. 2. They go to the ranks that have the models. 3. These compute; so does
every rank what needs no other one. 4. The numbers come back. 5. They become scores.

Ranks meet in steps 2 and 4, in which nothing else can fail; all else fails in the others, and then in all ranks. As
several rewards take every step side by side, models on different ranks compute at the same time.
"""

from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TypeVar

import torch.distributed as dist

from align.distributed.ranks import lost, raise_shared
from align.errors import AlignError, RewardError

T = TypeVar("T")
STEPS = 5


def in_step(steps: Generator[None, None, T]) -> T:
    """The outcome. All ranks must call it; an error of one is raised in all, after the step, and says whose it is."""
    while True:
        found = on_all_ranks(lambda: _next(steps))
        if found is not None:
            return found[0]


def _next(steps: Generator[None, None, T]) -> tuple[T] | None:
    try:
        next(steps)
    except StopIteration as end:
        return (end.value,)
    return None


class RankLost(RewardError):
    """Ranks cannot reach each other any more, so that this one tells the others nothing."""

    def __init__(self, what: str, error: Exception):
        super().__init__(lost(what, error))


def on_all_ranks(action: Callable[[], T]) -> T:
    """What each rank finds, unless one of them fails: then that failure, in all, with the rank's number. An exception
    that is none of ours (of a function of the user's) stays what it is where it was raised."""
    try:
        found = action()
    except RankLost:
        raise
    except Exception as error:
        ours = type(error) if isinstance(error, AlignError) else None
        said = str(error) if ours else f"{type(error).__name__}: {error}"
        told = (ours or RewardError)(f"rank {dist.get_rank()}: {said}")
        with suppress(AlignError):
            _tell(told)
        if ours:
            raise told from error
        raise
    _tell(None)
    return found


def _tell(failure: AlignError | None) -> None:
    """Raise the first failure of any rank in all."""
    try:
        raise_shared(failure)
    except AlignError:
        raise
    except Exception as error:
        raise RankLost("rewards on some ranks", error) from error
