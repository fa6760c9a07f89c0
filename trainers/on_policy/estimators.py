"""How advantages are estimated: the interface of an estimator, and the registry."""

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from align.errors import ConfigError
from align.lazy import defined_again, imported
from align.rollout.types import SamplingParams
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.streams import Stream

ESTIMATORS: dict[str, type["Estimator"]] = {}


@dataclass
class Estimate:
    """What an estimator says of a stream. N samples, L tokens.

    advantages: [N, L], detached, 0 outside the mask. returns: [N, L], what the critic should have said, None without
    one. metrics: numbers to log by name; the log shows their mean.
    """

    advantages: Tensor
    returns: Tensor | None = None
    metrics: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Estimator(ABC):
    """From scores to advantages. Knows no trainer: subclasses are dataclasses whose fields are the options of the
    configuration that they read, checked in `__post_init__`.

    needs_values: whether a critic is trained, whose values `Stream.values` then holds. whitens: whether advantages have
    mean 0 and deviation 1 over the rollout. cancels_scale: whether a factor on all scores cancels from them.
    """

    needs_values = False

    @property
    def whitens(self) -> bool:
        return False

    @property
    def cancels_scale(self) -> bool:
        return self.whitens

    def requests(self, sampling: SamplingParams) -> list[SamplingParams]:
        """The requests made for every prompt, in order. The first is the one that is trained on."""
        return [sampling]

    @abstractmethod
    def estimate(self, stream: Stream, ranks: Ranks) -> Estimate:
        """The advantages of one stream of scores. `ranks`: operations over all processes."""

    def metrics(self, rollout: ScoredRollout) -> dict[str, list[float]]:
        """What there is to log about the completions themselves."""
        return {}


def register_estimator(name: str, estimator: type[Estimator] | None = None) -> Any:
    """Adds an estimator of yours to the table, as a call or as a decorator; the option `estimator` knows its name."""
    if estimator is None:
        return lambda cls: register_estimator(name, cls)
    if name in ESTIMATORS and not defined_again(ESTIMATORS[name], estimator):
        raise ConfigError(f"there is an estimator {name!r} already: give yours another name")
    if not (isinstance(estimator, type) and issubclass(estimator, Estimator)):
        raise ConfigError(f"estimator {name!r} must be a subclass of Estimator, got {estimator!r}")
    ESTIMATORS[name] = estimator
    return estimator


def make_estimator(args: Any) -> Estimator:
    """The estimator that a configuration (`OnPolicyConfig`) names, with its options."""
    kind = _find(args.estimator)
    options = {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    if needed - options.keys():
        raise ConfigError(
            f"estimator {args.estimator!r} reads {', '.join(sorted(needed - options.keys()))}, which "
            f"{type(args).__name__} does not have: use the configuration of its method, or one of your own"
        )
    return kind(**options)


def _find(name: str) -> type[Estimator]:
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    if ":" in name:  # where it is: "package.module:Class" or "path/file.py:Class"
        found = imported(name, "estimator")
        if not (isinstance(found, type) and issubclass(found, Estimator)):
            raise ConfigError(f"estimator: {name} is no subclass of Estimator")
        return found
    near = get_close_matches(name, ESTIMATORS, n=1)
    raise ConfigError(
        f"unknown estimator {name!r}{f', did you mean {near[0]!r}?' if near else ''} There are "
        f"{', '.join(sorted(ESTIMATORS))}; your own is named by register_estimator or as path/file.py:Class"
    )
