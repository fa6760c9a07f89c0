"""The one loop for offline pairs: the hooks of transformers' Trainer, which hand the work to the parts in this folder.

    data        PairData           datasets -> tokenised, numbered pairs
    planner     MicroBatchPlanner  the pairs of an optimiser step -> its micro-batches
    means       BatchMeans         what they measure, until it is logged
    evaluator   PairEvaluator      a number per pair, their means, and what trackers show

A method is a subclass that says what the losses of a batch are (`pair_losses`) and sets `planner` once its model is
there. The loss of an optimiser step is the mean over all of its pairs, whatever the micro-batches and processes.
The subclass for preference optimisation is in `pairs.preference`, the one for reward models in `align.trainers.reward`.
"""

import logging
from collections.abc import Callable, Collection
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from align.data.formats import columns_of
from align.data.limits import fit_sets
from align.data.sets import of_each
from align.data.streams import is_stream, sample_of
from align.errors import TrainingError
from align.modeling.types import Model
from align.objectives.pair_losses import RowLosses, check_losses
from align.trainers.core.experts import with_router_loss
from align.trainers.core.micro_batches import MicroBatchLists, in_lists
from align.trainers.pairs.config import PairConfig
from align.trainers.pairs.data import IDS, PairData, trained_lengths
from align.trainers.pairs.evaluation import CHOSEN, REJECTED, PairEvaluator, pairs_table, rewards_figure
from align.trainers.pairs.metrics import BatchMeans
from align.trainers.pairs.micro_batches import MicroBatchPlanner, PaddedPairs, PairRows, SharedPrefixPairs

logger = logging.getLogger(__name__)

UserMetrics = Callable[[EvalPrediction], dict[str, float]]


class PairTrainer(MicroBatchLists, Trainer):
    """The loop. Subclasses implement `pair_losses`."""

    reward_name = "reward"
    """What the number of a completion is called in tables and figures."""
    token_columns: tuple[str, ...] = ()
    """Columns of token ids that the layout takes beside those of the pair."""
    planner: MicroBatchPlanner

    args: PairConfig
    eval_dataset: Dataset | dict[str, Dataset] | None

    def __init__(
        self,
        load: Callable[[], Model],
        args: PairConfig,
        data: PairData,
        train_dataset,
        eval_dataset=None,
        callbacks=None,
        optimizers=(None, None),
        compute_metrics: UserMetrics | None = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        empty: Model | None = None,
    ):
        """load: the model, once the rows are tokenised: reading the weights of a large one takes minutes, after which
        nobody wants to learn of a bad row. empty: the same without its weights (`without_weights`), to check rows with.
        compute_metrics: called after an evaluation with the rewards of chosen and rejected, predictions [N, 2], and
        labels [N] of 0, as TRL's reward trainer calls it; what it returns is logged as `eval_<name>`."""
        self.user_metrics = compute_metrics
        self.data = data
        self.means = BatchMeans()
        self.evaluator = PairEvaluator()
        self._step_losses: list[tuple[Tensor, Tensor]] = []  # rows and losses of the micro-batches of this step
        self._eval_mean_length: float | None = None
        args.remove_unused_columns = False
        train_rows = data.prepare(train_dataset, "train")
        eval_rows = of_each(eval_dataset, lambda rows: data.prepare(rows, "eval"))
        if empty is not None:
            fit_sets(empty, self.longest_row, train_rows, eval_rows, data.tokenizer)
        super().__init__(
            model=load(),
            args=args,
            data_collator=PairRows,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=data.tokenizer,
            compute_metrics=self.pair_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if is_stream(train_dataset):
            names = sample_of(train_dataset).column_names
            self.make_endless(train_dataset, tuple(data.kept(names)))
        if eval_dataset is not None and not type(self).compute_loss.__module__.startswith("align."):
            logger.warning(
                "%s.compute_loss changes what is trained, and not eval_loss: evaluations take the losses of each pair, "
                "which `losses` gives to both (docs/preference.md, Your own loss)",
                type(self).__name__,
            )
        self.model_accepts_loss_kwargs = True  # the loss is normalised by the global count of pairs, not by Trainer

    # ---- what a method says -----------------------------------------------------------------------------------------

    def pair_losses(self, model: nn.Module, batch: dict[str, Tensor]) -> RowLosses:
        """The losses of a batch of the planner, and what to log. Under `torch.no_grad` in evaluations."""
        raise TypeError(f"{type(self).__name__} does not say what its losses are")

    def restore_state(self, state: dict) -> None:
        """Called before the first step of a resumed run, with what `extra_state` returned when it was saved."""

    @property
    def collator(self) -> PaddedPairs | SharedPrefixPairs:
        """What makes the tensors of a micro-batch: padded, or with shared prompts."""
        return self.planner.layout

    # ---- a step -----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """One optimiser step. transformers counts it in `num_batches` batches; these are lists of micro-batches, as
        many in all as the planner makes of the step's pairs."""
        groups = [] if self.finished else [batch.rows for batch in islice(epoch_iterator, num_batches)]
        if not groups:
            return [], None
        if self.resumed is not None and self.state.global_step == self.resumed.step:
            self.restore_state(self.resumed.state)
        step = self.planner.plan(groups, self._gather_counts)
        return in_lists(step.batches, len(groups)), step.pairs

    def _gather_counts(self, counts: Tensor) -> Tensor:
        """[1, n] on each process -> [processes, n], without waiting for the device where there is one process."""
        if self.accelerator.num_processes == 1:
            return counts
        return self.accelerator.gather(counts.to(self.args.device)).cpu()

    @with_router_loss(lambda batch, args: len(batch["row"]))
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = self._checked_losses(model, inputs)
        values = found.values()
        if self.state.global_step == (self.resume_step or 0):
            self.check_best_metric(self.metrics_of(values))
        self._step_losses.append((inputs["row"], values.pop("loss")))
        self.add_to_log(values)
        # The count is of all ranks, and DDP averages the gradients over them.
        return found.losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def _checked_losses(self, model: nn.Module, batch: dict[str, Tensor]) -> RowLosses:
        """`pair_losses`; a TrainingError for numbers that are not one per pair."""
        found = self.pair_losses(model, batch)
        check_losses(found, len(batch["row"]), f"{type(self).__name__}.losses")
        return found

    def add_to_log(self, values: dict[str, Tensor]) -> None:
        """What a micro-batch measured, a number per pair [B] by metric."""
        self.means.add(values)

    def check_step(self, loss: Tensor) -> None:
        """A TrainingError that names the rows whose loss is not finite."""
        rows, losses = (torch.cat(columns) for columns in zip(*self._step_losses, strict=True))
        self._step_losses.clear()
        check_finite(rows, losses, f"step {self.state.global_step + 1}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.means.flush(self.record)
        super().log(logs, start_time)

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """As transformers' `evaluate`; `eval_dataset` is prepared as the trainer's own is. Of several sets (a dict) the
        metrics are `eval_<name>_...`."""
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(sets, dict):  # transformers calls this for each, by its name where it is one of ours
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        name = eval_dataset if isinstance(eval_dataset, str) else None
        own = eval_dataset is None or name is not None
        if not own:
            eval_dataset = self.prepare_other(eval_dataset)
        with self.phase("evaluate"):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if own and {"wandb", "tensorboard"} & set(self.args.report_to):
                self.log_pairs(name)
        return metrics

    def predict(self, test_dataset, *args, **kwargs):
        """As transformers' `predict`; rows that are not prepared yet are."""
        if not {*IDS, "row", *self.token_columns} <= columns_of(test_dataset, streams=True) or is_stream(test_dataset):
            test_dataset = self.prepare_other(test_dataset)
        return super().predict(test_dataset, *args, **kwargs)

    def prepare_other(self, dataset):
        """A dataset that was not given to the trainer, as its own are."""
        rows = self.data.prepare(dataset, "eval")
        self.check_other(rows)
        return rows

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._eval_mean_length = float(trained_lengths(dataloader.dataset, "chosen_ids").mean())
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, model, inputs: PairRows, prediction_loss_only, ignore_keys=None):
        tables, order = [], []
        for indices in self.planner.within_budget(inputs.rows, self._gather_max):
            batch = self.planner.collate([inputs.rows[i] for i in indices])
            batch["mean_chosen_length"] = torch.tensor(self._eval_mean_length, dtype=torch.float32)
            batch = self._prepare_inputs(batch)
            with torch.no_grad():
                values = self._checked_losses(model, batch).values()
            check_finite(batch["row"], values["loss"], "evaluation")
            tables.append(self.evaluator.columns(values))
            order += indices
        table = torch.cat(tables)[torch.tensor(order).argsort().to(tables[0].device)]
        return None, table, table[:, 0]  # pair_metrics takes the means; the labels are not used

    def _gather_max(self, count: int) -> int:
        return int(self._gather_counts(torch.tensor([[count]])).max())

    def metrics_of(self, values: Collection[str]) -> Collection[str]:
        """Names of what an evaluation of such values of a batch measures: those of `pair_metrics`."""
        return values

    def pair_metrics(self, prediction) -> dict[str, float]:
        """The means of an evaluation; more of them in a subclass."""
        metrics, values = self.evaluator.means(prediction.predictions), self.evaluator.values
        if self.user_metrics is None:
            return metrics
        rewards = np.stack([values[CHOSEN], values[REJECTED]], axis=-1)
        own = self.user_metrics(EvalPrediction(predictions=rewards, label_ids=np.zeros(len(rewards), dtype=np.int64)))
        if not isinstance(own, dict):
            raise TrainingError(f"compute_metrics must return numbers by name (a dict), got {type(own).__name__}")
        return metrics | own

    def log_pairs(self, name: str | None) -> None:
        """Send pairs of the evaluation set that was just evaluated, and the distribution of their rewards, to the
        trackers; name: of one among several."""
        pairs = self.eval_dataset[name] if isinstance(self.eval_dataset, dict) and name else self.eval_dataset
        assert isinstance(pairs, Dataset)
        suffix = f"/{name}" if name else ""
        chosen, rejected = self.evaluator.values[CHOSEN], self.evaluator.values[REJECTED]
        shown = {"name": self.reward_name, "step": self.state.global_step}
        rows = pairs.select(range(min(self.args.num_logged_pairs, len(pairs))))
        columns, table = pairs_table(rows, self.processing_class.decode, chosen, rejected, **shown)
        if table:
            self.log_table(f"completions{suffix}", columns, table)
        self.log_figure(f"eval/{self.reward_name}s{suffix}", rewards_figure(chosen, rejected, **shown))


def check_finite(rows: Tensor, losses: Tensor, where: str) -> None:
    """TrainingError for losses [B] that are not finite, with the numbers of their rows [B]."""
    finite = losses.isfinite()
    if not finite.all():
        raise TrainingError(
            f"{where}: the loss is not finite on rows {rows[~finite].tolist()}. Look at these rows, or lower the "
            "learning rate"
        )
