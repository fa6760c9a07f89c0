"""The table of preference losses, and how to add to it.

A loss is a function `f(pairs, *, beta=..., option=...) -> [B]` of `PairLogps`: its keyword-only parameters are its
options, and their defaults are the loss's own. `align.objectives.preference_objective` makes a weighted sum of them.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from align.errors import ConfigError
from align.lazy import defined_again
from align.objectives import beta_dpo, dpo, reference_free, tdpo
from align.objectives.pair_logps import PairLogps, pair_logps

__all__ = ["LOSSES", "MODIFIERS", "PairLogps", "PreferenceLoss", "pair_logps", "register_loss"]

MODIFIERS = ("f_divergence_type", "ld_alpha", "use_weighting")


def implicit_rewards(pairs: PairLogps, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta rho of chosen and rejected, [B] each; beta lp where there is no reference."""
    if pairs.ref_chosen is None:
        return beta * pairs.chosen, beta * pairs.rejected
    return beta * pairs.chosen_ratio, beta * pairs.rejected_ratio


@dataclass(frozen=True)
class PreferenceLoss:
    """One entry of the table.

    function: `PairLogps` and keyword options -> losses per pair [B].
    needs_reference, needs_kl: it looks at the reference's log-probs, at the KL sums.
    across_pairs: a pair's loss depends on the other pairs of its batch.
    needs_mean_length: it looks at `mean_chosen_length`.
    modifiers: those of MODIFIERS that change it. unaffected: those that leave it as it is, and that are accepted where
        another loss of the list takes them; any other is refused.
    rewards: what is logged as the rewards of chosen and rejected, from `PairLogps` and beta (or further options).
    state: makes the object that is kept, saved and resumed over the run; its keyword-only parameters are options too.
    """

    function: Callable[..., Tensor]
    needs_reference: bool = True
    needs_kl: bool = False
    across_pairs: bool = False
    needs_mean_length: bool = False
    modifiers: tuple[str, ...] = ("ld_alpha", "use_weighting")
    unaffected: tuple[str, ...] = ()
    rewards: Callable[..., tuple[Tensor, Tensor]] = implicit_rewards
    state: Callable | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """The configuration keys that it uses besides beta, without the modifiers."""
        return tuple(name for name in self.defaults if name != "beta")

    @property
    def defaults(self) -> dict:
        """Its options, beta among them, and their defaults; `inspect.Parameter.empty` where there is none."""
        state = {} if self.state is None else keyword_options(self.state)
        return {name: p.default for name, p in {**keyword_options(self.function), **state}.items()}


def keyword_options(function: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function, but for those that the trainer fills in."""
    parameters = inspect.signature(function).parameters
    return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in ("draw", "seed")}


_difference = partial(PreferenceLoss, modifiers=MODIFIERS)  # losses of Delta alone, which an f-divergence can replace
_free = partial(
    PreferenceLoss, needs_reference=False, modifiers=("use_weighting",), unaffected=("f_divergence_type",)
)  # with ld_alpha their means per token would no longer be means

LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": _difference(dpo.sigmoid),
    "cdpo": _difference(dpo.cdpo),
    "robust": _difference(dpo.robust),
    "hinge": _difference(dpo.hinge),
    "ipo": _difference(dpo.ipo),
    "ipo_sum": _difference(dpo.ipo_sum),
    "sigmoid_norm": _difference(dpo.sigmoid_norm),
    "exo_pair": _difference(dpo.exo_pair),
    "discopop": _difference(dpo.discopop),
    "rpo_sum": _difference(dpo.rpo_sum),
    "rpo_mean": _difference(dpo.rpo_mean),
    "nca_pair": PreferenceLoss(dpo.nca_pair),
    "bco_pair": PreferenceLoss(dpo.bco_pair),
    "sppo_hard": PreferenceLoss(dpo.sppo_hard),
    "apo_zero": PreferenceLoss(dpo.apo_zero),
    "apo_down": PreferenceLoss(dpo.apo_down),
    "aot": PreferenceLoss(dpo.aot, across_pairs=True, modifiers=("ld_alpha",)),  # sorted losses are no pair's to weigh
    "aot_unpaired": PreferenceLoss(dpo.aot_unpaired, across_pairs=True, modifiers=("ld_alpha",)),
    "beta_dpo": PreferenceLoss(beta_dpo.beta_dpo, across_pairs=True, state=beta_dpo.BetaDPOState),
    "tdpo1": PreferenceLoss(tdpo.tdpo1, needs_kl=True, modifiers=("use_weighting",), rewards=tdpo.tdpo_rewards),
    "tdpo2": PreferenceLoss(tdpo.tdpo2, needs_kl=True, modifiers=("use_weighting",), rewards=tdpo.tdpo_rewards),
    "sft": _free(dpo.sft, needs_mean_length=True, unaffected=("f_divergence_type", "ld_alpha")),
    "cpo": _free(reference_free.cpo, needs_mean_length=True),
    "simpo": _free(reference_free.simpo, rewards=reference_free.mean_rewards),
    "simpo_hinge": _free(reference_free.simpo_hinge, rewards=reference_free.mean_rewards),
    "alphapo": _free(reference_free.alphapo, rewards=reference_free.alphapo_rewards),
    "orpo": _free(reference_free.orpo, rewards=reference_free.mean_rewards),
}


def register_loss(
    name: str,
    function: Callable[..., Tensor] | None = None,
    *,
    needs_reference: bool = True,
    needs_kl: bool = False,
    across_pairs: bool = False,
    modifiers: tuple[str, ...] = ("ld_alpha", "use_weighting"),
):
    """Adds a loss of yours to the table, as a call or as a decorator; `loss_type` then knows its name.

    Args:
        function: `f(pairs, *, beta=0.1, my_option=1.0) -> [B]`; what comes after the star are its options.
        needs_reference, needs_kl, across_pairs, modifiers: as in `PreferenceLoss`. Add `f_divergence_type` to the
            modifiers if the function looks at `pairs.delta` or the scores, and not at the ratios.
    """
    if function is None:
        return partial(
            register_loss,
            name,
            needs_reference=needs_reference,
            needs_kl=needs_kl,
            across_pairs=across_pairs,
            modifiers=modifiers,
        )
    if name in LOSSES and not defined_again(LOSSES[name].function, function):
        raise ConfigError(f"there is a loss {name!r} already: give yours another name")
    _check_signature(name, function)
    unknown = [modifier for modifier in modifiers if modifier not in MODIFIERS]
    if unknown:
        raise ConfigError(f"loss {name!r}: unknown modifiers {unknown}; there are {', '.join(MODIFIERS)}")
    LOSSES[name] = PreferenceLoss(
        function,
        needs_reference=needs_reference,
        needs_kl=needs_kl,
        across_pairs=across_pairs,
        modifiers=modifiers,
        unaffected=() if needs_reference else ("f_divergence_type",),
    )
    return function


def _check_signature(name: str, function: Callable) -> None:
    first, *others = inspect.signature(function).parameters.values()
    if first.kind is first.KEYWORD_ONLY or any(p.kind is not p.KEYWORD_ONLY for p in others):
        raise ConfigError(f"loss {name!r} must have the form f(pairs, *, beta=0.1, ...): options by keyword only")
    taken = {p.name for p in others} & {*MODIFIERS, "f_alpha_divergence_coef", "draw", "seed"}
    if taken:
        raise ConfigError(f"loss {name!r}: {', '.join(sorted(taken))} mean something else; rename the options")
