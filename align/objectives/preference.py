"""The table of preference losses."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from align.objectives import dpo
from align.objectives.pair_logps import PairLogps, pair_logps

__all__ = ["LOSSES", "PairLogps", "PreferenceLoss", "pair_logps"]


@dataclass(frozen=True)
class PreferenceLoss:
    """One entry of the table.

    function: `PairLogps` and keyword options -> losses per pair [B]. needs_reference: it looks at the reference's
    log-probs. needs_kl: it looks at the KL sums. across_pairs: a pair's loss depends on the other pairs of its batch.
    """

    function: Callable[..., Tensor]
    needs_reference: bool = True
    needs_kl: bool = False
    across_pairs: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Its keyword options besides beta, as the function's signature has them."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "beta")


LOSSES = {
    "sigmoid": PreferenceLoss(dpo.sigmoid),
}
