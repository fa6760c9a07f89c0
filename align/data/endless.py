"""A stream without an end, shared by the processes of a run."""

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch

from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Row = dict[str, Any]


class EndlessRows(torch.utils.data.IterableDataset):
    """The rows of one process, pass after pass, for a run of `max_steps` steps.

    All processes read all rows and take their own batches of them, so that a run sees the same rows in the same steps
    on one process as on many, and every process finds the same bad row.

    Args:
        source: the stream as it was given, whose epoch is set before each pass: a shuffled one shuffles anew.
        passes: the same tokenised; iterated once per pass.
        batch: rows of a batch of one process. Of every `batch * world` rows this process takes its share.
        columns: that are kept; None: all.
        check: raises DataError for a row that cannot be trained on.
    """

    def __init__(
        self,
        source: "IterableDataset",
        passes: Any,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        columns: tuple[str, ...] | None = None,
        check: Callable[[Row], None] | None = None,
    ):
        self.source, self.passes = source, passes
        self.batch, self.rank, self.world = batch, rank, world
        self.columns, self.check = columns, check

    @property
    def info(self):
        """Of the stream: its name."""
        return self.source.info

    def __iter__(self) -> Iterator[Row]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise DataError("a stream is read by one worker per process: set dataloader_num_workers to 1 or 0")
        for number, row in enumerate(self.rows()):
            if number // self.batch % self.world == self.rank:
                yield row

    def rows(self) -> Iterator[Row]:
        """Those of all processes."""
        for epoch in count():
            self.source.set_epoch(epoch)
            empty = True
            for row in self.passes:
                empty = False
                if self.check is not None:
                    self.check(row)
                yield row if self.columns is None else self._projected(row)
            if empty:
                raise DataError("the stream has no row that can be trained on")

    def _projected(self, row: Row) -> Row:
        missing = [name for name in self.columns or () if row.get(name) is None]
        if missing:
            raise DataError(f"row {row.get('row')} of the stream has no {' and no '.join(missing)}")
        return {name: row[name] for name in self.columns or ()}

    def first(self, rows: int) -> "Dataset":
        """The first rows of all processes, as a dataset: fewer where a pass has fewer."""
        from datasets import Dataset

        self.source.set_epoch(0)
        found = list(islice(self.passes, rows))
        if not found:
            raise DataError("the stream has no row that can be trained on")
        names = self.columns or tuple(found[0])
        return Dataset.from_dict({name: [row[name] for row in found] for name in names})
