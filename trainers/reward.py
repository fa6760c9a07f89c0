"""Reward models from preference pairs (Bradley-Terry)."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from align.data.endless import EndlessRows
from align.data.streams import is_stream
from align.errors import ConfigError
from align.evaluation.calibration import Reliability, reliability
from align.modeling.dropout import disable_dropout
from align.modeling.load import load_sequence_classifier, train_in_float32
from align.modeling.padding import embeddings_of, padding_as_saved, with_own_padding
from align.modeling.prefix_support import SCORES, enable_shared_scores
from align.modeling.score_head import read_at_end_token
from align.modeling.scores import pair_scores
from align.modeling.types import Model
from align.objectives.pair_losses import PairLosses
from align.objectives.reward_model import bradley_terry_loss, centering, score_l2
from align.reward_models.normalizer import Normalizer
from align.trainers.core.batching import CheckSharedRows, autocast_dtype, resolve_layout
from align.trainers.core.loading import (
    end_as_tokenizer,
    loading_options,
    tokenizer_of,
    with_template,
    without_weights,
)
from align.trainers.core.trl_options import TrlRewardOptions
from align.trainers.pairs.config import PairConfig
from align.trainers.pairs.data import NUMBERS, SCORE_COLUMNS, PairData, with_score_margins
from align.trainers.pairs.evaluation import CHOSEN, REJECTED
from align.trainers.pairs.loop import PairTrainer, UserMetrics
from align.trainers.pairs.micro_batches import MicroBatchPlanner, PaddedPairs, SharedPrefixPairs

logger = logging.getLogger(__name__)

OF_SCORES = ("mean", "std", "min", "max")  # of both answers of an evaluation's pairs


@dataclass
class RewardConfig(TrlRewardOptions, PairConfig):
    """Options of reward-model training."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "A Jinja file, or a tokenizer's folder or hub name, whose chat template to use instead."},
    )
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of (s+ + s-)^2, which pulls the mean score to 0; 0.01 is usual."}
    )
    score_l2_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of (s+^2 + s-^2)/2, which keeps the scores small; 0.001 in the papers."}
    )
    score_margin: float | None = field(
        default=None,
        metadata={
            "help": "Above 0: the margin of a pair is this times chosen_score - rejected_score, columns of the data "
            "(of completions with scores they are made)."
        },
    )
    normalizer_pairs: int = field(
        default=1000,
        metadata={"help": "Without an evaluation set, the normaliser is fitted on at most so many training pairs."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.score_l2_coefficient < 0 or (self.center_rewards_coefficient or 0) < 0:
            raise ConfigError("score_l2_coefficient and center_rewards_coefficient must not be negative")
        if self.normalizer_pairs < 1:
            raise ConfigError("normalizer_pairs must be at least 1")


class RewardTrainer(PairTrainer):
    """Bradley-Terry on pairs; a column `margin` (or `score_margin` times the difference of scores) is subtracted from
    the score difference, a column `chosen_prob` is the probability that the chosen answer is preferred (without it: 1).

    The score is that of the last real token, the EOS. After training the normaliser is fitted on the evaluation pairs
    (without any: on training pairs, and the log says so) and saved with the model.

    Args:
        model: a folder or hub name (a causal model or an encoder; a missing head is drawn with `args.seed`), or a
            loaded classifier with one label.
        train_dataset, eval_dataset: preference pairs in TRL's formats, or the output of `tokenize_pairs`.
        peft_config: trains an adapter and the head.
        compute_metrics: further metrics, as `PairTrainer` has it.
        quantization_config: of transformers, for a model that is named; with peft_config.
        optimizer_cls_and_kwargs: as transformers' Trainer has it.
    """

    _tag_names = ["align", "trl", "reward-trainer"]
    paper = "Bradley-Terry on pairs; Stiennon et al. 2020, arXiv 2009.01325"
    reward_name = "score"
    args: RewardConfig
    config_class = RewardConfig
    normalizer: Normalizer | None

    def __init__(
        self,
        model: str | Model,
        args: RewardConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
        compute_metrics: UserMetrics | None = None,
        quantization_config: Any = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ):
        args = self.options(args, model, train_dataset)
        if args.score_margin is not None and is_stream(train_dataset):
            raise ConfigError("score_margin is computed for all pairs before training, and the rows are a stream")
        options = loading_options(args, model, quantization_config)
        places = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
        known = embeddings_of(model, **places)
        processing_class = with_own_padding(tokenizer_of(args, model, processing_class), known)
        named = partial(load_scored, args, model, processing_class, peft_config, options)
        adapter, empty = peft_config is not None, without_weights(args, model, classifier=True)
        load = with_template(args.chat_template_path, named, processing_class, adapter=adapter)
        self.args, self.normalizer = args, None
        super().__init__(
            load,
            args,
            pair_data(processing_class, args),
            train_dataset,
            eval_dataset,
            callbacks,
            optimizers,
            compute_metrics,
            optimizer_cls_and_kwargs,
            empty=empty,
        )
        shares = self._share_prompts()
        if shares:
            self.add_callback(CheckSharedRows(self, SCORES))
        self.planner = MicroBatchPlanner(
            SharedPrefixPairs() if shares else PaddedPairs(processing_class.pad_token_id),
            args.train_batch_size,
            args.tokens_per_batch,
            as_given=args.tokens_per_batch is None,
        )

    def _share_prompts(self) -> bool:
        """Whether the two answers of a pair share the computation of their prompt; where they do, the model is made
        to."""
        models = (self.model,)  # a generator: `batching: padded` looks at none
        obstacles = (enable_shared_scores(m, self.args.max_length, autocast_dtype(self.args)) for m in models)
        return resolve_layout(self.args.batching, obstacles)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def pair_losses(self, model: nn.Module, batch: dict[str, Tensor]) -> PairLosses:
        chosen, rejected = pair_scores(model, batch).chunk(2)
        losses = self.losses_of_scores(chosen, rejected, batch)
        return PairLosses(losses, chosen, rejected, agreement(chosen - rejected, batch))

    def losses_of_scores(self, chosen: Tensor, rejected: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The loss of each pair; scores and losses are [B], or [K, B] of K members."""
        losses = bradley_terry_loss(chosen, rejected, batch.get("margin"), batch.get("chosen_prob"))
        if self.args.center_rewards_coefficient:
            losses = losses + self.args.center_rewards_coefficient * centering(chosen, rejected)
        if self.args.score_l2_coefficient:
            losses = losses + self.args.score_l2_coefficient * score_l2(chosen, rejected)
        return losses

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def metrics_of(self, values):
        return [*values, *(f"rewards/{name}" for name in OF_SCORES), "calibration_error"]

    def pair_metrics(self, prediction) -> dict[str, float]:
        metrics, values = super().pair_metrics(prediction), self.evaluator.values
        scores = np.concatenate([values[CHOSEN], values[REJECTED]])
        for name in OF_SCORES:
            metrics[f"rewards/{name}"] = float(getattr(scores, name)())
        if np.isfinite(scores).all():  # else evaluate refuses the means
            metrics["calibration_error"] = self.reliability().ece
        return metrics

    def reliability(self) -> Reliability:
        """The reliability curve of the last evaluation: sigmoid(score difference) against the labels."""
        values = self.evaluator.values
        return reliability(values["rewards/margins"], labels=values.get("chosen_prob"))

    def log_pairs(self, name: str | None) -> None:
        super().log_pairs(name)
        figure = reliability_figure(self.reliability(), f"step {self.state.global_step}")
        self.log_figure(f"eval/reliability{f'/{name}' if name else ''}", figure)

    # ---- normaliser -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        self.normalizer = None  # of an earlier call's weights: checkpoints have none
        output = super().train(resume_from_checkpoint, **kwargs)
        self.fit_normalizer()
        return output

    def fit_normalizer(self) -> None:
        """Score both answers of the evaluation pairs, or of some training pairs, and keep their mean and deviation."""
        what = self.score_pairs()
        self.normalizer = self.normalizer_of(CHOSEN, REJECTED, what)

    def score_pairs(self) -> str:
        """Fill the evaluator with the scores that normalisers are fitted on; returns a description of the pairs."""
        given, what = self.eval_dataset, "evaluation"
        if given is None:
            given, what = self._some_training_pairs(), "training"
            logger.warning("no evaluation set: the normaliser is fitted on %d training pairs", len(given))
        found = []
        for pairs in given.values() if isinstance(given, dict) else [given]:  # sets may have other columns
            self.predict(pairs)
            found.append(self.evaluator.values)
        shared = set.intersection(*map(set, found))
        self.evaluator.values = {name: np.concatenate([values[name] for values in found]) for name in shared}
        return f"both answers of {len(self.evaluator.values[CHOSEN])} {what} pairs"

    def _some_training_pairs(self) -> Dataset:
        if isinstance(self.train_dataset, EndlessRows):
            trained = self.args.max_steps * self.args.train_batch_size * self.args.world_size
            trained *= self.args.gradient_accumulation_steps
            return self.train_dataset.first(min(self.args.normalizer_pairs, trained))  # no row that was not reached
        count = min(self.args.normalizer_pairs, len(self.train_dataset))
        return self.train_dataset.select(np.random.default_rng(0).permutation(len(self.train_dataset))[:count])

    def normalizer_of(self, chosen: str, rejected: str, what: str) -> Normalizer:
        """The normaliser of two metrics of the evaluator."""
        values = np.concatenate([self.evaluator.values[chosen], self.evaluator.values[rejected]])
        normalizer = Normalizer.fit(torch.from_numpy(values), what)
        logger.info("normaliser: mean %.4g, deviation %.4g", normalizer.mean, normalizer.std)
        return normalizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with padding_as_saved(self.model, self.processing_class):
            super().save_model(output_dir, _internal_call)
        if self.args.should_save and self.normalizer is not None:
            # last, when the others are on the disk: members of an ensemble that have one are taken for whole
            self.normalizer.save(output_dir or self.args.output_dir)


def load_scored(args: RewardConfig, model: Any, tokenizer: Any, peft_config: Any, options: dict[str, Any]) -> Model:
    """A classifier with one label, and its adapter. options: of `loading_options`."""
    classifier = load_sequence_classifier(
        model,
        peft_config=peft_config,
        adapter_seed=args.seed,
        pad_token_id=tokenizer.pad_token_id,
        head_seed=args.seed,
        sharded=True,
        **options,
    )
    if args.eos_token is not None:
        end_as_tokenizer(classifier, tokenizer)
    train_in_float32(classifier, adapter=peft_config is not None)
    # transformers refuses batches without one; where the last token is, the attention mask says
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    read_at_end_token(classifier)
    if args.disable_dropout:
        disable_dropout(classifier)
    return classifier


def agreement(margins: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`rewards/accuracies`: how often the label prefers the answer with the higher score, [B], never at a tie; and soft
    labels."""
    right, labels = margins > 0, batch.get("chosen_prob")
    if labels is None:
        return {"rewards/accuracies": right}
    return {"rewards/accuracies": torch.where(right, labels, (1 - labels) * (margins < 0)), "chosen_prob": labels}


def pair_data(tokenizer, args: RewardConfig) -> PairData:
    """How a reward model's datasets are prepared."""
    return PairData(
        tokenizer,
        args.max_length,
        args.max_bad_share,
        optional=NUMBERS if args.score_margin is None else (*NUMBERS, *SCORE_COLUMNS),
        further=None if args.score_margin is None else partial(with_score_margins, scale=args.score_margin),
        num_proc=args.dataset_num_proc,
        scored=True,
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
