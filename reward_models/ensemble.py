"""Ensembles: one reward made of several (Coste et al. 2023)."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from align.errors import RewardError
from align.objectives.ensemble import aggregate, check_rule
from reward_models.base import Reward, RewardBatch, RewardOutput
from reward_models.classifier import ClassifierReward

FILE_NAME = "ensemble.json"
FORMAT = "align.reward_ensemble/1"


class RewardEnsemble(Reward):
    """mean, worst case (wco) or mean minus lambda times the variance (uwo) of the members' scores.

    The extras of each score are `member/<i>`, `mean` and `variance`.

    Args:
        members: rewards of any kind. aggregation: "mean", "wco" or "uwo".
        lambda_: of uwo, required there and refused elsewhere. Its unit is 1/score.
        ddof: 0 is the paper's population variance, 1 the unbiased one of their released PPO code.
        normalize: classifiers trained on pairs have arbitrary offset and scale, so wco and uwo refuse a classifier
            member without a normaliser. False lifts this, for members that are on one scale by other means.
    """

    def __init__(
        self,
        members: Sequence[Reward],
        aggregation: str = "uwo",
        *,
        lambda_: float | None = None,
        ddof: int = 0,
        name: str = "ensemble",
        normalize: bool = True,
    ):
        self.name = name
        self.members = list(members)
        self.aggregation, self.lambda_, self.ddof = aggregation, lambda_, ddof
        try:
            check_rule(aggregation, len(self.members), lambda_, ddof)
        except RewardError as error:
            raise RewardError(f"reward {name!r}: {error}") from error
        raw = [m.name for m in self.members if isinstance(m, ClassifierReward) and not m.normalized]
        if raw and normalize and aggregation != "mean":
            raise RewardError(
                f"reward {name!r}: {aggregation} compares the members' scores, and {', '.join(raw)} have no "
                "normaliser, so their offsets would decide. Fit one (RewardTrainer does), or set normalize: false if "
                "they share a scale."
            )

    def _score(self, batch: RewardBatch) -> RewardOutput:
        scores = torch.stack([member.score(batch).scores.float() for member in self.members])
        result = aggregate(scores, self.aggregation, lambda_=self.lambda_, ddof=self.ddof)
        members = {f"member/{i}": row for i, row in enumerate(scores)}
        return RewardOutput(result.scores, {**members, "mean": result.mean, "variance": result.variance})


def save_ensemble(folder: str | Path, members: Sequence[str]) -> Path:
    """Write ensemble.json, which names the members' folders relative to `folder`."""
    path = Path(folder) / FILE_NAME
    absent = [member for member in members if not (path.parent / member).is_dir()]
    if absent:
        raise RewardError(f"{path.parent} has no folder {', '.join(absent)}")
    path.write_text(json.dumps({"format": FORMAT, "members": list(members)}, indent=2) + "\n")
    return path


def ensemble_members(folder: str | Path) -> list[Path]:
    """The members' folders of a saved ensemble."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise RewardError(f"{folder} is not a saved ensemble: it has no {FILE_NAME}")
    saved = json.loads(path.read_text())
    if saved.get("format") != FORMAT or not saved.get("members"):
        raise RewardError(f"{path}: expected format {FORMAT!r} and a list of members")
    members = [path.parent / member for member in saved["members"]]
    absent = [str(member) for member in members if not member.is_dir()]
    if absent:
        raise RewardError(f"{path} names members that are not there: {', '.join(absent)}")
    return members


def load_ensemble(
    folder: str | Path,
    aggregation: str = "uwo",
    *,
    lambda_: float | None = None,
    ddof: int = 0,
    name: str | None = None,
    normalize: bool = True,
    **classifier_options,
) -> RewardEnsemble:
    """The ensemble saved in `folder` (`train_reward_ensemble` makes one).

    With `normalize` every member must have its normaliser; without, the members' raw scores are combined.
    classifier_options: of `ClassifierReward`, for every member (device, batch_size, policy_tokenizer ...).
    """
    members = [
        ClassifierReward(member, name=member.name, normalize=normalize, **classifier_options)
        for member in ensemble_members(folder)
    ]
    return RewardEnsemble(
        members, aggregation, lambda_=lambda_, ddof=ddof, name=name or Path(folder).name, normalize=normalize
    )
