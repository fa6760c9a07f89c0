"""KTO (Ethayarajh et al. 2024, arXiv 2402.01306): preference optimisation on answers that are good or bad on their own.

A row goes through the loop for pairs as (its prompt, its answer, another row's answer): the reference point z0 is
estimated on the latter, so reference, cache and batches are those of pairs.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from align.data.formats import columns_of
from align.data.unpaired import mismatched, tokenize_unpaired, unpair
from align.errors import ConfigError
from align.modeling.pairs import completions, pair_tokens
from align.modeling.types import Model
from align.objectives.kto import UnpairedLosses, kto_losses, reference_point, weight_advice
from align.trainers.core.trl_options import TrlDPOOptions
from align.trainers.pairs.config import PreferenceConfig
from align.trainers.pairs.data import IDS, beginnings, flat_column, list_column, numbered_pairs
from align.trainers.pairs.evaluation import labelled_figure, labelled_table
from align.trainers.pairs.micro_batches import PaddedPairs
from align.trainers.pairs.preference import PreferenceTrainer

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
LOSSES = ("kto", "apo_zero_unpaired")


@dataclass
class KTOConfig(TrlDPOOptions, PreferenceConfig):
    """Options of KTO, with TRL's names. Batch sizes count answers."""

    loss_type: str = field(
        default="kto",
        metadata={"help": "kto, or apo_zero_unpaired: the same without a reference point.", "choices": list(LOSSES)},
    )
    desirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss of desirable answers, the paper's lambda_D."}
    )
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss of undesirable answers, the paper's lambda_U."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.batching == "shared_prefix":
            raise ConfigError(
                "batching: shared_prefix has the answers of a prompt in one row, and KTO's rows have one answer each: "
                "leave it out",
                key="batching",
            )


class AnswerRows(PaddedPairs):
    """Padded batches of which one side runs at a time: a row counts once."""

    def tokens_of(self, row: dict) -> int:
        return super().tokens_of(row) // 2


class KTOTrainer(PreferenceTrainer):
    """Train on answers with a label: `loss_type` kto or apo_zero_unpaired (`align.objectives.kto`).

    z0 is one number per optimiser step, the mean over all of its rows on all processes, so that the loss does not
    depend on how a step is cut into micro-batches (TRL has one z0 per micro-batch). It is computed before the step's
    gradients, without gradient, on answers to other prompts, which follow from the data alone
    (`align.data.unpaired.mismatched`). In an evaluation it is one number for the whole set.

    Args:
        model: a model, a folder or a hub name.
        train_dataset, eval_dataset: rows of `prompt`, `completion` and `label`, or preference pairs, of which each is
            two rows (docs/data.md); or either of them tokenised.
        ref_model: the reference; by default the policy as it starts (with LoRA: the adapter switched off).
        peft_config: trains an adapter.
        compute_metrics: called after an evaluation with the rewards [N] and the labels [N].
    """

    _tag_names = ["align", "trl", "kto"]
    paper = "Ethayarajh et al. 2024, arXiv 2402.01306"
    args: KTOConfig
    config_class = KTOConfig
    columns = ("label",)

    @staticmethod
    def read_rows(dataset, tokenizer, **options):
        """Labelled answers or pairs -> tokenised answers as the loop for pairs takes them, for now without the answers
        to other prompts."""
        if {*IDS} <= columns_of(dataset):
            rows = unpair(numbered_pairs(dataset, tokenizer, **options))
        else:
            rows = tokenize_unpaired(dataset, tokenizer, **options)
        return rows.rename_column("completion_ids", "chosen_ids")

    def prepare_dataset(self, dataset, name: str):
        """With the answers to other prompts, cut to what fits, as `rejected_ids`; of the training rows the weights are
        checked."""
        args = self.args
        if name == "train":
            labels = np.asarray(dataset["label"][:], dtype=bool)
            counts = int(labels.sum()), int((~labels).sum())
            advice = weight_advice(*counts, args.desirable_weight, args.undesirable_weight)
            if advice:
                logger.warning("%s", advice)
        prompts = flat_column(dataset, "prompt_ids")
        partners = mismatched(*prompts, f"{name}: ") if args.loss_type == "kto" else np.arange(len(dataset))
        lengths, ids = flat_column(dataset, "chosen_ids")
        kept = lengths[partners]
        if args.max_length is not None:
            kept = np.minimum(kept, args.max_length - prompts[0])
        if args.loss_type != "kto":  # nothing looks at them
            kept = np.minimum(kept, 1)
        return dataset.add_column("rejected_ids", list_column(beginnings(lengths, ids, partners, kept), kept))

    def _check_stream(self) -> None:
        raise ConfigError(
            "KTO pairs each prompt with an answer to another one before training, and the rows are a stream: load them "
            "without streaming"
        )

    def layout(self, models: list[Model]) -> PaddedPairs:
        return AnswerRows(self.data.tokenizer.pad_token_id)

    # ---- the reference point ----------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        lists, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [batch for part in lists for batch in part]
        point: Tensor | float = 0.0
        if batches and self.args.loss_type == "kto":
            self.model_wrapped.train()  # as in the step, before which transformers may not have said so yet
            with self.phase("reference_point"), torch.no_grad(), self.compute_loss_context_manager():
                total = sum(
                    self.other_ratios(self.model_wrapped, self._prepare_inputs(batch)).sum() for batch in batches
                )
            point = reference_point(self.accelerator.reduce(total, "sum") / count.to(self.args.device))
            self.record("kl", point.item(), float(count))
        return [[{**side(batch, 0), "kl": torch.as_tensor(point)} for batch in part] for part in lists], count

    def other_ratios(self, model: nn.Module, batch: Batch) -> Tensor:
        """log pi(y'|x) - log ref(y'|x) of the answers to other prompts, [B], in nats, without gradient."""
        others = side(batch, 1)
        with torch.no_grad():
            policy = pair_tokens(model, others, chunk_size=self.args.chunk_size)
        return (policy.logps - self.reference_tokens(others).logps).sum(-1)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def pair_losses(self, model: nn.Module, batch: Batch) -> UnpairedLosses:
        if "kl" in batch:
            return self._losses(model, batch, batch["kl"])
        losses = self._losses(model, side(batch, 0), 0.0)  # whose reference point is that of the whole evaluation set
        if self.args.loss_type == "kto":
            losses.others = self.other_ratios(model, batch)
        return losses

    def _losses(self, model: nn.Module, answers: Batch, point: Tensor | float) -> UnpairedLosses:
        policy = pair_tokens(model, answers, chunk_size=self.args.chunk_size)
        reference = self.reference_tokens(answers)
        self.check_same_start(
            model, policy, reference, lambda: pair_tokens(model, answers, chunk_size=self.args.chunk_size)
        )
        logps = policy.logps.sum(-1)
        ratios, labels = logps - reference.logps.sum(-1), answers["label"]
        return UnpairedLosses(self._kto(ratios, labels, point), self.args.beta * ratios, logps, labels)

    def _kto(self, ratios: Tensor, labels: Tensor, point: Tensor | float) -> Tensor:
        args = self.args
        return kto_losses(
            ratios,
            labels,
            point,
            beta=args.beta,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
        )

    # ---- metrics ----------------------------------------------------------------------------------------------------

    def add_to_log(self, values: dict[str, Tensor]) -> None:
        for name, rows in (("chosen", values["label"]), ("rejected", 1 - values["label"])):
            self.means.add({f"rewards/{name}": values["reward"], f"logps/{name}": values["logps"]}, rows)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return with_margin(means)

    def metrics_of(self, values):
        of_sides = [f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected")]
        return ["loss", *of_sides, "rewards/margins", *(["kl"] if self.args.loss_type == "kto" else [])]

    def pair_metrics(self, prediction) -> dict[str, float]:
        self.evaluator.means(prediction.predictions)
        found = {name: torch.from_numpy(values).double() for name, values in self.evaluator.values.items()}
        ratios, labels = found["reward"] / self.args.beta, found["label"]
        metrics: dict[str, float] = {}
        point = torch.zeros(())
        if "others" in found:
            point = reference_point(found["others"].mean())
            metrics["kl"] = point.item()
        metrics["loss"] = self._kto(ratios, labels, point).mean().item()
        for name, rows in (("chosen", labels == 1), ("rejected", labels == 0)):
            if rows.any():
                metrics[f"rewards/{name}"] = found["reward"][rows].mean().item()
                metrics[f"logps/{name}"] = found["logps"][rows].mean().item()
        if self.user_metrics is not None:
            given = EvalPrediction(
                predictions=self.evaluator.values["reward"], label_ids=labels.numpy().astype(np.int64)
            )
            metrics |= self.user_metrics(given)
        return with_margin(metrics)

    def log_pairs(self, name: str | None) -> None:
        sets: Any = self.eval_dataset
        rows = sets[name] if name and isinstance(sets, dict) else sets
        suffix, step, values = f"/{name}" if name else "", self.state.global_step, self.evaluator.values
        shown = rows.select(range(min(self.args.num_logged_pairs, len(rows))))
        columns, table = labelled_table(shown, self.processing_class.decode, values["reward"], step=step)
        if table:
            self.log_table(f"completions{suffix}", columns, table)
        figure = labelled_figure(values["reward"], values["label"] == 1, step=step)
        self.log_figure(f"eval/rewards{suffix}", figure)


def side(batch: Batch, which: int) -> Batch:
    """The answers (0) or those to other prompts (1) of a padded batch of `PairCollator`, as a batch of its own."""
    rows = len(batch["row"])
    part = slice(which * rows, (which + 1) * rows)
    width = int(batch["attention_mask"][part].sum(-1).max())
    tokens = {name: batch[name][part, :width] for name in ("input_ids", "attention_mask", "completion_mask")}
    if "ref_logps" in batch:
        longest = completions(tokens).mask.shape[1]
        tokens["ref_logps"] = batch["ref_logps"][part, :longest]
    return {**tokens, "row": batch["row"], "label": batch["label"]}


def with_margin(means: dict[str, float]) -> dict[str, float]:
    """`rewards/margins`: the mean reward of desirable answers minus that of undesirable ones, where both are there."""
    if {"rewards/chosen", "rewards/rejected"} <= means.keys():
        return {**means, "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
    return means
