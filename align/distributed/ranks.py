"""What the processes of a run tell each other, so that none waits in a collective for one that has failed."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from align.errors import AlignError, one_line

T = TypeVar("T")


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def shared(value: Any) -> Any:
    """The value of the first process, in all."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def raise_shared(failure: AlignError | None) -> None:
    """Raise the first failure that any process has in all: they would wait for it in their next collective."""
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if failure is None else (type(failure), str(failure)))
    if failure is not None:
        raise failure
    for kind, message in filter(None, told):
        raise kind(message)


def in_all(action: Callable[[], T]) -> T:
    """What each process finds, unless one of them fails: then that failure, in all."""
    try:
        found = action()
    except AlignError as error:
        raise_shared(error)
        raise
    raise_shared(None)
    return found


def by_first(action: Callable[[], T]) -> T | None:
    """What the first process finds, None in the others; its failure in all."""
    return in_all(lambda: action() if is_first() else None)


def lost(what: str, error: Exception) -> str:
    """What to say where a collective of torch has failed, whose own error names nobody."""
    return (
        f"{what}: a process of the run has ended, or did not answer within ddp_timeout ({one_line(error)}). Its own "
        "output says why; the last checkpoint is whole"
    )


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process."""
    if not dist.is_initialized():
        return flag
    flags: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return any(flags)
