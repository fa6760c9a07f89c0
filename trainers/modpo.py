"""MODPO: preference optimisation of a weighted sum of objectives (Zhou et al. 2023), as one stable supervised loss."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import ConfigError
from align.modeling.pairs import PairTokens
from align.objectives.modpo import LOSS_TYPES, check_weight, modpo_loss, modpo_rewards
from align.objectives.pair_losses import PairLosses
from align.reward_models.margins import COLUMNS, MarginRewards
from align.trainers.core.hooks import TrainingSettings
from align.trainers.core.loading import tokenizer_of
from align.trainers.pairs.config import PreferenceConfig
from align.trainers.pairs.preference import PreferenceTrainer

logger = logging.getLogger(__name__)

SWEEP = "sweep"


@dataclass
class WeightOptions(TrainingSettings):
    """Which objectives there are and what each counts. Mixed into the config of a method with weights."""

    objective: str = field(
        default="preference", metadata={"help": "Name of the objective that the pairs of the dataset are about."}
    )
    weights: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "One weight per objective, {preference: 0.5, short: 0.5}; or `sweep`: train the front. "
            "Default: the same weight for all."
        },
    )
    sweep_points: int | None = field(
        default=None, metadata={"help": "Points of a sweep between two objectives, both ends counted. Default: 5."}
    )
    sweep_min_weight: float | None = field(
        default=None,
        metadata={
            "help": "Smallest weight of `objective` in a sweep. Default: 0 where the policy of that weight is there "
            "already (the one margin reward is `implicit`, of the same beta and reference), else 0.1."
        },
    )
    interpolate: int | None = field(
        default=None, metadata={"help": "Further points between neighbours of a sweep, by interpolating their weights."}
    )

    def check_weights(self) -> None:
        only_sweep = {name: getattr(self, name) for name in ("sweep_points", "sweep_min_weight", "interpolate")}
        given = [name for name, value in only_sweep.items() if value is not None]
        if isinstance(self.weights, str) and self.weights != SWEEP:
            raise ConfigError(f"weights is a mapping from objective to weight, or `sweep`, got {self.weights!r}")
        if isinstance(self.weights, dict):
            if given:
                raise ConfigError(f"{', '.join(given)}: only for `weights: sweep`")
            bad = {name: weight for name, weight in self.weights.items() if not math.isfinite(weight)}
            if bad:
                raise ConfigError(f"weights must be finite numbers, got {bad}")
            if self.objective not in self.weights:
                raise ConfigError(
                    f"weights are given for {list(self.weights)}, and the pairs' own objective is {self.objective!r}: "
                    "set `objective` to its name, or give it a weight"
                )
        if self.sweep_points is not None and self.sweep_points < 2:
            raise ConfigError(f"a sweep has at least 2 points, got sweep_points {self.sweep_points}")
        if self.sweep_min_weight is not None and not 0 <= self.sweep_min_weight < 1:
            raise ConfigError(f"sweep_min_weight must be from 0 to below 1, got {self.sweep_min_weight}")
        if self.interpolate is not None and self.interpolate < 1:
            raise ConfigError(f"interpolate counts the points between two neighbours, from 1, got {self.interpolate}")

    def weights_of(self, others: list[str]) -> tuple[float, list[float]]:
        """The weight of `objective`, and those of the other objectives in their order. ConfigError unless `weights`
        names exactly these. Without `weights` all have the same."""
        if isinstance(self.weights, str):
            raise ConfigError(
                f"one policy has one weight per objective: weights: {{{self.objective}: 0.5, ...}}, got "
                f"{self.weights!r} (a sweep is trained by `align modpo` or train_front)"
            )
        if self.objective in others:
            raise ConfigError(
                f"{self.objective!r} is the name of the pairs' own objective and of another one: set `objective`, or "
                "give the reward another `name`"
            )
        expected = [self.objective, *others]
        if self.weights is None:
            return 1 / len(expected), [1 / len(expected)] * len(others)
        if sorted(expected) != sorted(self.weights):
            raise ConfigError(f"the objectives are {expected}, and weights are given for {list(self.weights)}")
        return self.weights[self.objective], [self.weights[name] for name in others]


@dataclass
class MODPOConfig(WeightOptions, PreferenceConfig):
    """Options of MODPO. The effective KL strength is beta / weight of `objective`."""

    loss_type: str = field(default="sigmoid", metadata={"help": "sigmoid or hinge.", "choices": list(LOSS_TYPES)})
    margin_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the margin rewards' scores, which runs may share. Default: output_dir/margins."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_weights()
        if isinstance(self.weights, dict):
            check_weight(self.weights[self.objective], f"the trained objective {self.objective!r}")

    @property
    def margin_folder(self) -> Path:
        return Path(self.margin_cache_dir or Path(self.output_dir) / "margins")


class MODPOTrainer(PreferenceTrainer):
    """Train on one objective's pairs, with the other objectives as margin rewards, for one weight vector.

    Args:
        reward: of every other objective: a `Reward`, a function, a spec (docs/rewards.md), a list of them, or
            `MarginRewards`. Their names, and `args.objective`, are the names in `args.weights`. They are scored once
            per dataset and kept in `args.margin_cache_dir`.
    """

    _tag_names = ["align", "modpo"]
    paper = "Zhou et al. 2023, arXiv 2310.03708"
    args: MODPOConfig
    config_class = MODPOConfig
    columns = COLUMNS

    def __init__(
        self,
        model: str | nn.Module,
        reward: Any,
        args: MODPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        args = self.options(args, model, train_dataset)
        processing_class = tokenizer_of(args, model, processing_class)
        self.margins = reward
        if not isinstance(reward, MarginRewards):
            self.margins = MarginRewards(reward, processing_class, args.margin_folder)
        self.weight, self.margin_weights = args.weights_of(self.margins.names)
        against = [name for name, weight in zip(self.margins.names, self.margin_weights, strict=True) if weight < 0]
        if against:
            logger.warning(
                "weights below 0 ask for less of %s: the policy goes towards completions with lower scores. Give it a "
                "weight above 0 if its larger scores are the better ones",
                ", ".join(against),
            )
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        self.margins.free()

    def further_facts(self) -> dict[str, str]:
        return {"margin rewards": ", ".join(self.margins.names)}

    def prepare_dataset(self, dataset, name: str):
        return self.margins.add_to(dataset)

    def losses(self, policy: PairTokens, reference: PairTokens | None, batch: dict[str, Tensor]) -> PairLosses:
        assert reference is not None  # needs_reference
        logps, ref_logps = policy.logps.sum(-1), reference.logps.sum(-1)
        margins = torch.cat([batch[column] for column in COLUMNS])
        rewards = modpo_rewards(
            logps,
            ref_logps,
            margins,
            weight=self.weight,
            margin_weights=torch.tensor(self.margin_weights),
            beta=self.args.beta,
        )
        chosen, rejected = rewards.chunk(2)
        agreement = self.agreement((logps - ref_logps).detach(), margins)
        return PairLosses(modpo_loss(chosen, rejected, self.args.loss_type), chosen, rejected, agreement)

    def agreement(self, log_ratios: Tensor, margins: Tensor) -> dict[str, Tensor]:
        """For every objective, whether the policy prefers the completion that this objective prefers, or the other one
        where its weight is below 0, per pair (0.5 where the objective finds both as good). log_ratios: [2B]; margins:
        [2B, M]."""
        policy = torch.sub(*log_ratios.chunk(2)).sign()
        found = {self.args.objective: policy}
        for name, weight, column in zip(self.margins.names, self.margin_weights, margins.unbind(-1), strict=True):
            found[name] = policy * torch.sub(*column.chunk(2)).sign() * (-1 if weight < 0 else 1)
        return {f"agreement/{name}": (1 + signs) / 2 for name, signs in found.items()}
