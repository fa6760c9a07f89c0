"""Baselines for MODPO: DPO on a weighted mixture of the objectives' pairs, and soups of policies of one objective each.

Both need preference pairs of every objective. Their fronts are written as MODPO's are, for `align front`.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from align.errors import ConfigError
from align.evaluation.front import Front, Point, write_front
from align.modeling.adapters import named_base
from align.modeling.pairs import PairTokens
from align.modeling.soups import make_soup
from align.objectives.modpo import modpo_loss
from align.objectives.pair_losses import PairLosses
from align.reward_models.margins import rows_fingerprint
from align.trainers.core.loading import tokenizer_of
from align.trainers.modpo import WeightOptions
from align.trainers.pairs.config import PreferenceConfig
from align.trainers.pairs.data import numbered_pairs
from align.trainers.pairs.preference import PreferenceTrainer
from align.trainers.sweeps.front import (
    POINT_FILE,
    Model,
    check_model,
    check_sweep,
    loaded,
    lora,
    point_name,
    sweep_weights,
    train_points,
)
from align.trainers.sweeps.kept import start_identity

logger = logging.getLogger(__name__)

PAIR_WEIGHT = "pair_weight"


@dataclass
class LossWeightingConfig(WeightOptions, PreferenceConfig):
    """Options of DPO loss weighting. `objective` names the objective whose weight a sweep takes from 1 downwards."""

    def __post_init__(self):
        super().__post_init__()
        self.check_weights()


class LossWeightingTrainer(PreferenceTrainer):
    """One policy on the pairs of all objectives: `sum_k w_k E_{D_k}[ -log sigmoid(beta * Delta) ]` (DPO-LW).

    Args:
        train_dataset: the pairs of every objective, by its name, as `args.weights` has them. They are mixed and
            shuffled; a pair counts w_k N / N_k, so that the sizes of the sets do not matter.
    """

    _tag_names = ["align", "dpo-loss-weighting"]
    columns = (PAIR_WEIGHT,)
    args: LossWeightingConfig

    def __init__(
        self,
        model: str | nn.Module,
        args: LossWeightingConfig,
        train_dataset: dict,
        processing_class=None,
        **kwargs,
    ):
        processing_class = tokenizer_of(args, model, processing_class)
        others = [name for name in train_dataset if name != args.objective]
        weight, rest = args.weights_of(others)
        weights = dict(zip([args.objective, *others], [weight, *rest], strict=True))
        mixed = mix(tokenized_sets(train_dataset, processing_class, args), weights)
        super().__init__(model, args, mixed, None, processing_class, **kwargs)

    def losses(self, policy: PairTokens, reference: PairTokens | None, batch: dict[str, Tensor]) -> PairLosses:
        assert reference is not None  # needs_reference
        rewards = self.args.beta * (policy.logps - reference.logps).sum(-1)
        chosen, rejected = rewards.chunk(2)
        return PairLosses(batch[PAIR_WEIGHT] * modpo_loss(chosen, rejected), chosen, rejected)


def tokenized_sets(datasets: dict, tokenizer, args: PreferenceConfig) -> dict:
    options: dict[str, Any] = {
        "max_length": args.max_length,
        "max_bad_share": args.max_bad_share,
        "num_proc": args.dataset_num_proc,
    }
    return {name: numbered_pairs(dataset, tokenizer, **options) for name, dataset in datasets.items()}


def mix(datasets: dict, weights: dict[str, float]):
    """The tokenised pairs of all objectives as one dataset, with the column `pair_weight`; sets of weight 0 are left
    out. `row` counts from 0 through the mixture."""
    from datasets import concatenate_datasets

    bad = {name: weight for name, weight in weights.items() if weight < 0}
    if bad or not any(weights.values()):
        raise ConfigError(f"loss weights must not be negative, and one must be positive: {weights}")
    parts = {name: dataset for name, dataset in datasets.items() if weights[name] > 0}
    total = sum(map(len, parts.values()))
    weighted = [
        dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).add_column(
            PAIR_WEIGHT, np.full(len(dataset), weights[name] * total / len(dataset), dtype=np.float32)
        )
        for name, dataset in parts.items()
    ]
    return concatenate_datasets(weighted).add_column("row", np.arange(total))


def train_loss_weighting_front(
    model: Model,
    args: LossWeightingConfig,
    train_dataset: dict,
    processing_class=None,
    *,
    peft_config=None,
    callbacks=None,
    resume: bool = False,
    model_name: str | None = None,
) -> Path:
    """As `train_front`, with DPO loss weighting. train_dataset: the pairs of every objective, by its name."""
    processing_class = check_model(model, processing_class)
    check_sweep(args)
    objectives = [args.objective, *(name for name in train_dataset if name != args.objective)]
    vectors = sweep_weights(objectives, args, 0.0)
    sets = tokenized_sets(train_dataset, processing_class, args)

    def trainer(point_args: LossWeightingConfig) -> LossWeightingTrainer:
        return LossWeightingTrainer(
            loaded(model), point_args, sets, processing_class, peft_config=lora(peft_config), callbacks=callbacks
        )

    data = {name: rows_fingerprint(dataset) for name, dataset in sets.items()}
    identity = {**start_identity(model_name if callable(model) else str(model)), "data": data}
    return train_points("dpo_lw", trainer, args, objectives, vectors, identity, peft_config, seconds={}, resume=resume)


def soup_front(
    policies: dict[str, str | Path], vectors: Sequence[dict[str, float]], output_dir: str | Path, reference: str
) -> Path:
    """Soups of policies that were trained on one objective each (rewarded soups), one per weight vector.

    policies: the folder of each objective's policy. reference: what they started from. A policy's own training time is
    counted where its folder says it (a point of a sweep).
    """
    root, points = Path(output_dir), []
    for weights in vectors:
        if weights.keys() != policies.keys():
            raise ConfigError(f"the policies are of {list(policies)}, and weights are given for {list(weights)}")
        name = point_name(weights)
        make_soup([policies[key] for key in weights], list(weights.values()), root / name)
        points.append(Point(name, name, dict(weights), kind="soup"))
    seconds = {}
    for objective, folder in policies.items():
        done = Path(folder) / POINT_FILE
        if done.exists():
            seconds[objective] = json.loads(done.read_text())["seconds"]
    write_front(Front("dpo_soups", named_base(str(reference)), list(policies), points, seconds), root)
    return root
