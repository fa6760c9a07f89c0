"""Reward models from preference pairs (Bradley-Terry)."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed

from align.data.bad_rows import BadRow
from align.data.checks import check_pair_numbers
from align.data.collate import PairCollator
from align.data.shared_prefix import SharedPrefixCollator
from align.data.tokenize import tokenize_pairs
from align.errors import ConfigError, DataError
from align.evaluation.calibration import Reliability, reliability
from align.modeling.load import disable_dropout, load_sequence_classifier, load_tokenizer
from align.modeling.padding import padding_as_saved, with_own_padding
from align.modeling.pairs import pair_count
from align.modeling.prefix_support import enable_shared_scores
from align.modeling.scores import pair_scores
from align.objectives.reward_model import bradley_terry_loss, centering, score_l2
from align.reward_models.normalizer import FILE_NAME as NORMALIZER_FILE
from align.reward_models.normalizer import Normalizer
from align.reward_models.sequences import longest_input
from align.trainers.core.batching import BatchingOptions, resolve_layout
from align.trainers.core.options import BaseConfig
from align.trainers.core.trainer import TrainerMixin
from align.trainers.pairs.data import IDS, flat_column
from align.trainers.pairs.evaluation import CHOSEN, REJECTED, PairEvaluation

logger = logging.getLogger(__name__)


@dataclass
class RewardConfig(BatchingOptions, BaseConfig):
    """Options of reward-model training. Batch sizes count pairs."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Prompt and completion together, in tokens; longer completions are cut."}
    )
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of (s+ + s-)^2, which pulls the mean score to 0; 0.01 is usual."}
    )
    score_l2_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of (s+^2 + s-^2)/2, which keeps the scores small; 0.001 in the papers."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    normalizer_pairs: int = field(
        default=1000,
        metadata={"help": "Without an evaluation set, the normaliser is fitted on at most so many training pairs."},
    )
    num_logged_pairs: int = field(default=8, metadata={"help": "Pairs shown per evaluation in the tracker; 0: none."})

    def __post_init__(self):
        super().__post_init__()
        if self.score_l2_coefficient < 0 or (self.center_rewards_coefficient or 0) < 0:
            raise ConfigError("score_l2_coefficient and center_rewards_coefficient must not be negative")
        if self.normalizer_pairs < 1:
            raise ConfigError("normalizer_pairs must be at least 1")
        if self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor is for token labels: give the pairs a column chosen_prob, 0.9 where you would "
                "have smoothed by 0.1"
            )


class RewardTrainer(PairEvaluation, TrainerMixin, Trainer):
    """Bradley-Terry on pairs; a column `margin` is subtracted from the score difference, a column `chosen_prob` is the
    probability that the chosen answer is preferred (without it: 1).

    The score is that of the last real token, the EOS. After training the normaliser is fitted on the evaluation pairs
    (without any: on training pairs, and the log says so) and saved with the model.

    Args:
        model: a folder or hub name (a causal model or an encoder; a missing head is drawn with `args.seed`), or a
            loaded classifier with one label.
        train_dataset, eval_dataset: preference pairs in TRL's formats, or the output of `tokenize_pairs`.
        peft_config: trains an adapter and the head.
    """

    _tag_names = ["align", "reward-model"]
    reward_name = "score"

    def __init__(
        self,
        model: str | nn.Module,
        args: RewardConfig,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
    ):
        processing_class = with_own_padding(processing_class or load_tokenizer(model))
        set_seed(args.seed)  # a new adapter is drawn at random
        model = load_sequence_classifier(
            model,
            peft_config=peft_config,
            pad_token_id=processing_class.pad_token_id,
            head_seed=args.seed,
            sharded=True,
        )
        # transformers refuses batches without one; where the last token is, the attention mask says
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        if args.disable_dropout:
            disable_dropout(model)
        self.normalizer: Normalizer | None = None
        train_dataset = tokenized_pairs(train_dataset, processing_class, args)
        if eval_dataset is not None:
            eval_dataset = tokenized_pairs(eval_dataset, processing_class, args)
        _check_lengths(train_dataset, eval_dataset, longest_input(model))
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collator(model, args, processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=self.pair_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # the loss is normalised by the global count of pairs, not by Trainer

    def _collator(self, model: nn.Module, args: RewardConfig, tokenizer) -> PairCollator | SharedPrefixCollator:
        shares = resolve_layout(args.batching, (self._cannot_share(m, args) for m in [model]))
        return SharedPrefixCollator() if shares else PairCollator(tokenizer.pad_token_id)

    def _cannot_share(self, model: nn.Module, args: RewardConfig) -> str | None:
        return enable_shared_scores(model, args.max_length)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor([sum(map(pair_count, batches))], device=device)
        return batches, self.accelerator.gather(pairs).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        values = self.pair_values(model, inputs)
        losses = values.pop("loss")
        for name, column in values.items():
            self.record(name, column.detach().float().mean().item(), len(column))
        # The count is of all ranks, and DDP averages the gradients over them.
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def pair_values(self, model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen, rejected = pair_scores(model, batch).chunk(2)
        return {
            "loss": self.pair_losses(chosen, rejected, batch),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            **agreement(chosen - rejected, batch),
        }

    def pair_losses(self, chosen: Tensor, rejected: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The loss of each pair; scores and losses are [B], or [K, B] of K members."""
        losses = bradley_terry_loss(chosen, rejected, batch.get("margin"), batch.get("chosen_prob"))
        if self.args.center_rewards_coefficient:
            losses = losses + self.args.center_rewards_coefficient * centering(chosen, rejected)
        if self.args.score_l2_coefficient:
            losses = losses + self.args.score_l2_coefficient * score_l2(chosen, rejected)
        return losses

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def pair_metrics(self, prediction) -> dict[str, float]:
        metrics = super().pair_metrics(prediction)
        scores = np.concatenate([self.eval_values[CHOSEN], self.eval_values[REJECTED]])
        for name in ("mean", "std", "min", "max"):
            metrics[f"rewards/{name}"] = float(getattr(scores, name)())
        if np.isfinite(scores).all():  # else evaluate refuses the means
            metrics["calibration_error"] = self.reliability().ece
        return metrics

    def reliability(self) -> Reliability:
        """The reliability curve of the last evaluation: sigmoid(score difference) against the labels."""
        return reliability(self.eval_values["rewards/margins"], labels=self.eval_values.get("chosen_prob"))

    def _log_pairs(self, chosen: np.ndarray, rejected: np.ndarray) -> None:
        super()._log_pairs(chosen, rejected)
        figure = reliability_figure(self.reliability(), f"step {self.state.global_step}")
        self.log_figure("eval/reliability", figure)

    # ---- normaliser -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        output = super().train(resume_from_checkpoint, **kwargs)
        self.fit_normalizer()
        return output

    def fit_normalizer(self) -> None:
        """Score both answers of the evaluation pairs, or of some training pairs, and keep their mean and deviation."""
        what = self.score_pairs()
        self.normalizer = self.normalizer_of("rewards/chosen", "rewards/rejected", what)

    def score_pairs(self) -> str:
        """Fill `eval_values` with the pairs that normalisers are fitted on; returns what these are, in words."""
        pairs, what = self.eval_dataset, "evaluation"
        if pairs is None:
            count = min(self.args.normalizer_pairs, len(self.train_dataset))
            pairs = self.train_dataset.select(np.random.default_rng(0).permutation(len(self.train_dataset))[:count])
            what = "training"
            logger.warning("no evaluation set: the normaliser is fitted on %d training pairs", count)
        self.predict(pairs)
        return f"both answers of {len(pairs)} {what} pairs"

    def normalizer_of(self, chosen: str, rejected: str, what: str) -> Normalizer:
        """The normaliser of two columns of `eval_values`."""
        values = np.concatenate([self.eval_values[chosen], self.eval_values[rejected]])
        normalizer = Normalizer.fit(torch.from_numpy(values), what)
        logger.info("normaliser: mean %.4g, deviation %.4g", normalizer.mean, normalizer.std)
        return normalizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with padding_as_saved(self.model, self.processing_class):
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            if self.normalizer is not None:
                self.normalizer.save(folder)
            elif not _internal_call:  # an earlier model's would be taken for this one's
                (folder / NORMALIZER_FILE).unlink(missing_ok=True)


def agreement(margins: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`rewards/accuracies`: how often the label prefers the answer with the higher score, [B]; and soft labels."""
    right, labels = margins > 0, batch.get("chosen_prob")
    if labels is None:
        return {"rewards/accuracies": right}
    return {"rewards/accuracies": torch.where(right, labels, 1 - labels), "chosen_prob": labels}


def tokenized_pairs(dataset, tokenizer, args: RewardConfig):
    """The columns that training needs; a dataset that is tokenised already is taken as it is."""
    if set(IDS) <= set(dataset.column_names):
        _check_numbers(dataset)
    else:
        dataset = tokenize_pairs(dataset, tokenizer, max_length=args.max_length, max_bad_share=args.max_bad_share)
    columns = (*IDS, "margin", "chosen_prob", "row")
    return dataset.select_columns([c for c in columns if c in dataset.column_names])


def _check_numbers(dataset) -> None:
    names = [name for name in ("margin", "chosen_prob") if name in dataset.column_names]
    for place, row in enumerate(dataset.select_columns(names) if names else ()):
        try:
            check_pair_numbers(row)
        except BadRow as reason:
            raise DataError(f"tokenised pairs, row {place}: {reason}") from reason


def _check_lengths(train_dataset, eval_dataset, limit: int | None) -> None:
    """An index error in the middle of a run says less."""
    for what, dataset in (("training", train_dataset), ("evaluation", eval_dataset)):
        if dataset is None or limit is None:
            continue
        prompt, chosen, rejected = (flat_column(dataset, column)[0] for column in IDS)
        lengths = prompt + np.maximum(chosen, rejected)
        if lengths.max() > limit:
            raise ConfigError(
                f"{(lengths > limit).sum()} {what} pairs are longer than the {limit} tokens that the model takes (up "
                f"to {lengths.max()}): set max_length: {limit}"
            )


def reliability_figure(curve: Reliability, title: str):
    """How often the preferred answer was right against how sure the model was of it, and how many pairs say so."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0.5, 1], [0.5, 1], color="black", linewidth=1, label="calibrated")
    filled = curve.count > 0
    above.plot(curve.confidence[filled], curve.accuracy[filled], marker="o", label=f"model (error {curve.ece:.3f})")
    above.set(ylabel="share that is right", ylim=(0, 1.02), title=title)
    above.legend()
    below.stairs(curve.count, curve.edges, fill=True)
    below.set(xlabel="confidence, sigmoid(|score difference|)", ylabel="pairs")
    return figure
