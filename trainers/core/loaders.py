"""The loaders of a trainer's batches: streams, and rows that `dataloader_drop_last` leaves out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from align.data.endless import EndlessRows
from align.data.limits import Reader, check_read, row_check
from align.errors import ConfigError
from align.trainers.core.prepared import EvaluatesUntrained


class LoadsRows(EvaluatesUntrained):
    """Of every trainer."""

    args: Any
    train_dataset: Any
    readers: list[Reader]  # the models that read the rows

    def own_parts(self) -> dict[str, Any]:
        """What may be code of the user's, by its option: a resumed run must have the same."""
        return {"data_collator": self.data_collator, "optimizer_cls_and_kwargs": self.optimizer_cls_and_kwargs}

    def make_endless(self, source: IterableDataset, columns: tuple[str, ...] | None = None) -> None:
        """Train on `train_dataset`, one pass over the stream `source` tokenised, again and again; columns: of its rows,
        None: all."""
        self.train_dataset = EndlessRows(
            source,
            self.train_dataset,
            batch=self.args.train_batch_size,
            rank=self.args.process_index,
            world=self.args.world_size,
            columns=columns,
            check=row_check(self.readers, self.processing_class),
        )

    def check_dropped(self) -> None:
        """ConfigError where `dataloader_drop_last` leaves no row to train on, of which transformers says that the data
        have no length."""
        together = self.args.train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and isinstance(self.train_dataset, Dataset):
            if len(self.train_dataset) < together:
                raise ConfigError(
                    f"dataloader_drop_last leaves out all {len(self.train_dataset)} training rows, which are fewer "
                    f"than the {together} of a batch on {self.args.world_size} processes: leave it out, or lower "
                    "per_device_train_batch_size",
                    key="dataloader_drop_last",
                )

    def get_train_dataloader(self) -> DataLoader:
        """As transformers'; of a stream one that accelerate does not share out again, read by one worker at most: the
        order of the rows must not depend on their number."""
        if not isinstance(self.train_dataset, EndlessRows):
            return super().get_train_dataloader()
        args = self.args
        return DataLoader(
            self.train_dataset,
            batch_size=args.train_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="training"),
            num_workers=min(args.dataloader_num_workers, 1),
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def check_other(self, dataset: Any) -> None:
        """DataError for tokenised rows that were not given to the trainer, and that a model of the run cannot take."""
        if isinstance(dataset, Dataset):
            for reader in self.readers:
                check_read(reader, dataset, "evaluation", self.processing_class)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        self.check_other(eval_dataset)
        with self._every_row():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        self.check_other(test_dataset)
        with self._every_row():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _every_row(self) -> Iterator[None]:
        """`dataloader_drop_last` is for steps of one size. transformers leaves out the last rows of evaluations too, of
        a small set all."""
        given, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = given
