"""Evaluation on pairs: a number per pair by metric, their means, and what trackers show of them."""

import numpy as np
import torch
from torch import Tensor

from align.trainers.pairs.data import IDS

CHOSEN, REJECTED = "rewards/chosen", "rewards/rejected"


class PairEvaluator:
    """Lines up the numbers of an evaluation's batches for transformers, and keeps them.

    values: of the last evaluation or prediction, a number per pair [N] by metric, in the order of the dataset;
    empty before the first one.
    """

    def __init__(self):
        self.values: dict[str, np.ndarray] = {}
        self._names: tuple[str, ...] = ()

    def columns(self, values: dict[str, Tensor]) -> Tensor:
        """A number per pair [B] by metric -> [B, metrics], float32."""
        self._names = tuple(values)
        return torch.stack([column.float() for column in values.values()], dim=-1)

    def means(self, table: np.ndarray) -> dict[str, float]:
        """The means over all pairs. table: [N, metrics], the `columns` of all batches."""
        self.values = dict(zip(self._names, table.T, strict=True))
        return {name: float(values.mean()) for name, values in self.values.items()}


def pairs_table(rows, decode, chosen: np.ndarray, rejected: np.ndarray, *, name: str, step: int):
    """(columns, rows) of a tracker's table. rows: tokenised pairs; decode: ids -> text; chosen, rejected: their
    rewards, called `name`."""
    columns = ["step", "prompt", "chosen", "rejected", f"{name} chosen", f"{name} rejected"]
    return columns, [
        [step, *(decode(row[ids]) for ids in IDS), float(a), float(b)]
        for row, a, b in zip(rows, chosen, rejected, strict=False)
    ]


def rewards_figure(chosen: np.ndarray, rejected: np.ndarray, *, name: str, step: int):
    """Histograms of the rewards, called `name`, and of their margins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    both, margins = figure.subplots(1, 2)
    both.hist([chosen, rejected], bins=30, label=["chosen", "rejected"])
    both.set(xlabel=name, ylabel="answers", title=f"step {step}")
    both.legend()
    margins.hist(chosen - rejected, bins=30)
    margins.axvline(0, color="black", linewidth=1)
    margins.set(xlabel=f"{name} of chosen - {name} of rejected", ylabel="pairs")
    return figure


def labelled_table(rows, decode, rewards: np.ndarray, *, step: int):
    """As `pairs_table`, of answers with a label. rows: as KTO has them."""
    columns = ["step", "prompt", "completion", "label", "reward"]
    return columns, [
        [step, decode(row["prompt_ids"]), decode(row["chosen_ids"]), bool(row["label"]), float(reward)]
        for row, reward in zip(rows, rewards, strict=False)
    ]


def labelled_figure(rewards: np.ndarray, desirable: np.ndarray, *, step: int):
    """Histograms of the rewards [N] of desirable and of undesirable answers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3), layout="constrained")
    axis = figure.subplots()
    axis.hist([rewards[desirable], rewards[~desirable]], bins=30, label=["desirable", "undesirable"])
    axis.set(xlabel="reward", ylabel="answers", title=f"step {step}")
    axis.legend()
    return figure
