"""What the functions of this package are given, looked at: tensors of other shapes than are asked for would be
broadcast, and a number would come out that means nothing. Only shapes are read, so nothing waits for a device."""

from torch import Tensor

from align.errors import TrainingError


def check_same(dims: int | None = None, **tensors: Tensor | None) -> None:
    """TrainingError unless all of these have one shape, of `dims` dimensions if given. None is left out."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    shapes = {tensor.shape for tensor in given.values()}
    if len(shapes) > 1 or (dims is not None and any(len(shape) != dims for shape in shapes)):
        of = {None: "", 1: "of one dimension, a number per row", 2: "of two dimensions, [rows, tokens]"}
        what = "must have one shape" if len(given) > 1 else "must be"
        raise TrainingError(f"{_shown(given)}: {what} {of.get(dims, f'of {dims} dimensions')}".rstrip())


def check_per_row(rows: Tensor, **tensors: Tensor | None) -> None:
    """TrainingError unless each of these is [B], B being the first dimension of `rows`. None is left out."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if any(tensor.shape != rows.shape[:1] for tensor in given.values()):
        raise TrainingError(f"{_shown(given)}: must be [{len(rows) if rows.dim() else 'B'}], a number per row")


def check_pairs(**tensors: Tensor | None) -> None:
    """TrainingError unless all of these are [2B, L]: the rows of the chosen completions, then those of the rejected."""
    check_same(2, **tensors)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if any(len(tensor) % 2 for tensor in given.values()):
        raise TrainingError(
            f"{_shown(given)}: pairs have an even number of rows, all chosen and then all rejected ones"
        )


def check_detached(**tensors: Tensor | None) -> None:
    """TrainingError for what must carry no gradient: a reference or an earlier policy would be trained too, and an
    earlier policy that is the one that is trained has a ratio of 1 without gradient."""
    attached = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
    if attached:
        raise TrainingError(
            f"{', '.join(attached)}: carries a gradient; compute it under torch.no_grad(), or give it as .detach()"
        )


def _shown(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
