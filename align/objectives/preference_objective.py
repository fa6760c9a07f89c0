"""A weighted sum of the table's losses, checked against what the user set, and ready to be called by a trainer."""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from align.errors import ConfigError, TrainingError
from align.objectives.beta_dpo import PRESETS, BetaDraw
from align.objectives.f_divergences import F_DIVERGENCES, f_divergence
from align.objectives.pair_logps import PairLogps, pair_logps
from align.objectives.pair_losses import PairLosses, check_rows
from align.objectives.preference import LOSSES, MODIFIERS, PreferenceLoss, implicit_rewards, keyword_options

ABOVE_ZERO = (lambda value: 0 < value < math.inf, "> 0")
NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, ">= 0")
SHARE = (lambda value: 0 <= value < 1, "in [0, 1)")
RANGES = {
    "beta": ABOVE_ZERO,
    "label_smoothing": (lambda value: 0 <= value < 0.5, "in [0, 0.5)"),
    "discopop_tau": ABOVE_ZERO,
    "simpo_gamma": NOT_NEGATIVE,
    "cpo_alpha": NOT_NEGATIVE,
    "alphapo_alpha": (math.isfinite, "a finite number"),
    "rpo_eta": NOT_NEGATIVE,
    "rpo_coef": NOT_NEGATIVE,
    "tdpo_alpha": NOT_NEGATIVE,
    "beta_dpo_alpha": NOT_NEGATIVE,
    "beta_dpo_filter": SHARE,
    "beta_dpo_momentum": SHARE,
    "beta_dpo_preset": (lambda value: value in PRESETS, f"one of {', '.join(PRESETS)}"),
    "f_divergence_type": (lambda value: value in F_DIVERGENCES, f"one of {', '.join(F_DIVERGENCES)}"),
    "f_alpha_divergence_coef": (math.isfinite, "a finite number"),
    "ld_alpha": (lambda value: 0 <= value <= 1, "in [0, 1]"),
}
NOTHING = {"f_divergence_type": "reverse_kl", "use_weighting": False}
"""Values of modifiers that ask for nothing."""


@dataclass(frozen=True)
class Term:
    """One loss of the sum. options: all that its function and its state take, beta among them."""

    name: str
    loss: PreferenceLoss
    weight: float
    options: dict


class PreferenceObjective:
    """sum_k weight_k loss_k of pairs, with the modifiers applied. Made by `preference_objective`.

    states: what beta-DPO keeps over a run, by the loss's name: objects with `state_dict` and `load_state_dict`.
    """

    def __init__(self, terms: Sequence[Term], modifiers: dict, alpha: float | None = None, seed: int = 0):
        self.terms = tuple(terms)
        self.ld_alpha = modifiers.get("ld_alpha")
        self.use_weighting = modifiers.get("use_weighting", False)
        self.divergence = f_divergence(modifiers.get("f_divergence_type", "reverse_kl"), alpha)
        self.states = {
            term.name: term.loss.state(**accepted(term.loss.state, term.options), seed=seed)
            for term in self.terms
            if term.loss.state is not None
        }

    def _any(self, need: str) -> bool:
        return any(getattr(term.loss, need) for term in self.terms)

    @property
    def functions(self) -> list[Callable]:
        """Of the losses."""
        return [term.loss.function for term in self.terms]

    @property
    def needs_reference(self) -> bool:
        return self._any("needs_reference")

    @property
    def needs_kl(self) -> bool:
        return self._any("needs_kl")

    @property
    def across_pairs(self) -> bool:
        return self._any("across_pairs")

    @property
    def needs_mean_length(self) -> bool:
        return self._any("needs_mean_length")

    def pairs(
        self,
        logps: Tensor,
        mask: Tensor,
        ref_logps: Tensor | None = None,
        kl: Tensor | None = None,
        mean_chosen_length: Tensor | None = None,
    ) -> PairLogps:
        """Token values [2B, L] -> the sums, with `ld_alpha` and the f-divergence; arguments: `pair_logps`."""
        pairs = pair_logps(logps, mask, ref_logps, kl=kl, ld_alpha=self.ld_alpha)
        pairs.mean_chosen_length, pairs.divergence = mean_chosen_length, self.divergence
        return pairs

    def draw(
        self, pairs: PairLogps, gather: Callable[[Tensor], tuple[Sequence[Tensor], int]] | None = None
    ) -> dict[str, BetaDraw]:
        """What the states give to the losses for this batch; in training only, for it moves them.

        gather: a tensor [B] of this process -> those of all processes, in order, and this one's number.
        """
        if not self.states:
            return {}
        gaps = pairs.delta.detach()
        everyone, rank = ([gaps], 0) if gather is None else gather(gaps)
        return {name: state.step(everyone, rank) for name, state in self.states.items()}

    def parts(self, pairs: PairLogps, draws: dict[str, BetaDraw] | None = None) -> dict[str, Tensor]:
        """The losses [B] by name, without the weights. draws: of `draw`; None in evaluations."""
        draws = draws or {}
        found = {
            term.name: term.loss.function(
                pairs,
                **accepted(term.loss.function, term.options),
                **({"draw": draws.get(term.name)} if term.loss.state is not None else {}),
            )
            for term in self.terms
        }
        for name, losses in found.items():
            check_rows(f"loss {name!r}", losses, len(pairs.chosen), "pair")
            if pairs.chosen.requires_grad and torch.is_grad_enabled() and not losses.requires_grad:
                raise TrainingError(f"loss {name!r} has no gradient: it detaches the policy's log-probs")
        return found

    def __call__(
        self, pairs: PairLogps, weights: Tensor | None = None, draws: dict[str, BetaDraw] | None = None
    ) -> PairLosses:
        """The sum, its rewards, and of a mixture each loss as `loss/<name>`.

        weights: of the pairs [B], with `use_weighting` (`wpo_weights`). draws: of `draw`; None in evaluations.
        """
        parts = self.parts(pairs, draws)
        total = reduce(add, (term.weight * parts[term.name] for term in self.terms))
        metrics = {f"loss/{name}": values for name, values in parts.items()} if len(parts) > 1 else {}
        return PairLosses(total if weights is None else weights * total, *self._rewards(pairs), metrics)

    def _rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """What to log as rewards of chosen and rejected, [B] each, without gradient: those of the first loss that has
        a beta; log-ratios (without a reference log-probs) if none has."""
        with torch.no_grad():
            for term in self.terms:
                if "beta" in term.options:
                    return term.loss.rewards(pairs, **accepted(term.loss.rewards, term.options))
            return implicit_rewards(pairs, beta=1.0)


def accepted(function: Callable, options: dict) -> dict:
    """Those of the options that the function has."""
    return {name: options[name] for name in keyword_options(function) if name in options}


def preference_objective(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None = None,
    given: dict | None = None,
    seed: int = 0,
) -> PreferenceObjective:
    """The objective that a configuration describes. Raises ConfigError on anything that would be ignored.

    Args:
        loss_type: one name of LOSSES, or several.
        loss_weights: one per name; default 1 each.
        given: what the user set: beta, options of the losses, modifiers. None as a value is not set; every option that
            is not set has the default of its loss.
        seed: of beta-DPO's drawing.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    given = {name: value for name, value in (given or {}).items() if value is not None}
    losses = {name: _known(name) for name in names}
    weights = _checked_weights(names, loss_weights)
    _check_ranges(given)
    _check_exo(names, given)
    modifiers = {name: given[name] for name in MODIFIERS if name in given and given[name] != NOTHING.get(name)}
    for modifier, value in modifiers.items():
        _check_modifier(modifier, value, losses)
    alpha = given.get("f_alpha_divergence_coef")
    if alpha is not None and modifiers.get("f_divergence_type") != "alpha_divergence":
        raise ConfigError("f_alpha_divergence_coef is used with f_divergence_type: alpha_divergence only")
    options = {n: v for n, v in given.items() if n not in (*MODIFIERS, "f_alpha_divergence_coef")}
    options = {name: value for name, value in options.items() if not _neutral(name, value, losses)}
    _check_used(options, losses)
    if "beta" not in options:
        _check_betas(losses)
    terms = [
        Term(name, loss, weight, {n: options.get(n, default) for n, default in loss.defaults.items()})
        for (name, loss), weight in zip(losses.items(), weights, strict=True)
    ]
    return PreferenceObjective(terms, modifiers, alpha, seed)


def _known(name: str) -> PreferenceLoss:
    if name not in LOSSES:
        nearest = difflib.get_close_matches(str(name), LOSSES, n=1, cutoff=0.0)
        raise ConfigError(f"loss_type {name!r} is unknown; nearest: {nearest[0]!r}; all: {', '.join(LOSSES)}")
    return LOSSES[name]


def _checked_weights(names: list[str], weights: Sequence[float] | None) -> list[float]:
    if not names:
        raise ConfigError("loss_type names no loss")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"loss_type names {', '.join(twice)} twice: give it one weight in loss_weights")
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise ConfigError(f"loss_weights has {len(weights)} entries for {len(names)} losses ({', '.join(names)})")
    if not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(f"loss_weights must be finite and > 0, got {list(weights)}: leave out a loss of weight 0")
    return [float(weight) for weight in weights]


def _check_ranges(given: dict) -> None:
    for name, value in given.items():
        holds, wanted = RANGES.get(name, (None, ""))
        if holds is not None and not holds(value):
            raise ConfigError(f"{name} must be {wanted}, got {value!r}")


def _check_exo(names: list[str], given: dict) -> None:
    if "exo_pair" in names and given.get("label_smoothing") == 0:
        raise ConfigError("label_smoothing must be > 0 for exo_pair (its target would have no weight on one side)")


def _check_modifier(modifier: str, value, losses: dict[str, PreferenceLoss]) -> None:
    refusing = [n for n, loss in losses.items() if modifier not in (*loss.modifiers, *loss.unaffected)]
    using = [n for n, loss in losses.items() if modifier in loss.modifiers]
    if refusing or not using:
        usable = ", ".join(n for n, loss in LOSSES.items() if modifier in loss.modifiers)
        what = "cannot be used with" if refusing else "would be ignored by"
        raise ConfigError(f"{modifier}: {value} {what} {', '.join(refusing or losses)}; it works with {usable}")


def _neutral(name: str, value, losses: dict[str, PreferenceLoss]) -> bool:
    """Whether no loss here uses the option, and the value asks for nothing: a smoothing of 0, or the one default that
    the option has in the whole table (as in a configuration with its defaults written out)."""
    if any(name in loss.defaults for loss in losses.values()):
        return False
    defaults = {loss.defaults[name] for loss in LOSSES.values() if name in loss.defaults}
    return defaults == {value} or (name == "label_smoothing" and value == 0)


def _check_used(options: dict, losses: dict[str, PreferenceLoss]) -> None:
    for name in options:
        if any(name in loss.defaults for loss in losses.values()):
            continue
        users = [n for n, loss in LOSSES.items() if name in loss.defaults]
        if users:
            hint = f"the losses that use it: {', '.join(users)}"
        else:
            known = {option for loss in LOSSES.values() for option in loss.defaults}
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"no loss knows it; nearest: {nearest[0]}"
        raise ConfigError(f"{name} would be ignored by {', '.join(losses)}; {hint}")


def _check_betas(losses: dict[str, PreferenceLoss]) -> None:
    betas = {n: loss.defaults["beta"] for n, loss in losses.items() if "beta" in loss.defaults}
    without = [name for name, beta in betas.items() if beta is inspect.Parameter.empty]
    if without:
        raise ConfigError(f"set beta: {', '.join(without)} has no default for it")
    if len(set(betas.values())) > 1:
        stated = ", ".join(f"{name} {beta}" for name, beta in betas.items())
        raise ConfigError(f"set beta: the losses have one beta together, and their defaults differ ({stated})")
