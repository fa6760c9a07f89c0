"""From the columns of the reward matrix to the streams that are estimated, and to the weights that mix them.

A stream is a column of scores with an advantage of its own. Fixed weights make one stream, the weighted sum. Under
constraints the task and every constraint are streams, mixed by Lagrange multipliers (`constrained.py` beside this
file). The mixture is weights @ advantages, at every optimiser step with the weights of that moment.
"""

from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import create_model
from torch import Tensor

from align.config.sections import Section
from align.errors import ConfigError
from align.lazy import defined_again
from align.trainers.core.experts import reentrant
from align.trainers.weighting.sections import DYNAMIC_WEIGHTS, GradientSection, HypervolumeSection

TASK = "task"
FLAT_PATIENCE = 10  # rollouts


@dataclass(frozen=True)
class StreamSpec:
    """A stream of a weighting. kl: what the KL coefficient is multiplied by inside its reward, with `kl_in: reward`.
    penalty: what the penalty of a cut or long completion (`TruncationRule`) is multiplied by before it is taken off."""

    name: str
    kl: float = 0.0
    penalty: float = 0.0


@contextmanager
def rewards_named(weighting: "Weighting"):
    """ConfigError where a weighting of the user's asks for a reward that is not there."""
    try:
        yield
    except KeyError as error:
        known = list(weighting.reward_weights)
        if not error.args or error.args[0] in known:
            raise
        raise ConfigError(
            f"{type(weighting).__name__} asks for {error.args[0]!r}, and no reward is called that: the rewards are "
            f"{', '.join(known)}"
        ) from error


def weighted_sum(rewards: dict[str, float], weights: dict[str, float]) -> float:
    """sum_i w_i r_i over the rewards that have a weight and a score."""
    return sum(weight * rewards[name] for name, weight in weights.items() if name in rewards)


class Weighting(ABC):
    """What the loop asks of a weighting. `names` are the rewards, `weights` one number for each.

    streams: see `StreamSpec`. update_per: rollout or mini_batch, when `update` is called. standardize: whether each
    stream's advantages get mean 0 and deviation 1 before they are mixed. needs_gradients: names of the streams whose
    policy gradients it learns from, of the parameters whose name has the regular expression `gradient_parameters`.
    scaled: whether the mixture's deviation over the rollout becomes 1. needs_all: whether every completion needs a
    score of every reward. messages: warnings that the loop has not passed on yet. section: of a weighting that
    `register_weighting` names, the class of its options; an instance is made as `cls(names, weights, options)`.
    """

    section: type[Section] = Section
    streams = [StreamSpec(TASK, kl=1.0, penalty=1.0)]
    update_per = "rollout"
    standardize = False
    scaled = False
    needs_all = True
    needs_gradients: tuple[str, ...] = ()
    gradient_parameters = ""

    def __init__(self, names: list[str], weights: list[float], options: Any = None):
        self.options = options
        self.reward_weights = dict(zip(names, weights, strict=True))
        self.flat = dict.fromkeys(names, 0)  # updates in a row in which all scores of a reward were the same
        self.messages: list[str] = []

    @abstractmethod
    def scores(self, rewards: dict[str, float]) -> dict[str, float]:
        """The score of one completion in every stream, from its rewards by name."""

    def weights(self) -> list[float]:
        """What each stream's advantage is multiplied by now."""
        return [1.0]

    @property
    def kl_weight(self) -> float:
        """What the KL coefficient is multiplied by where the KL is in the loss, not in the rewards."""
        return sum(weight * stream.kl for weight, stream in zip(self.weights(), self.streams, strict=True))

    def update(self, columns: dict[str, Tensor], lengths: Tensor) -> dict[str, float]:
        """Learn from the rewards of the global batch, by name [B] (NaN where one does not apply), of completions of so
        many tokens of the policy's [B]; returns what to log."""
        for name, column in columns.items():
            column = column[~column.isnan()]
            if not len(column):
                continue
            self.flat[name] = self.flat[name] + 1 if (column == column[0]).all() else 0
            if self.flat[name] == FLAT_PATIENCE:
                self.messages.append(
                    f"reward {name!r} gave all {len(column)} completions of each of the last {FLAT_PATIENCE} batches "
                    f"the same score (now {column[0].item():g}): nothing can be learned from it"
                )
        return {}

    def observe(self, evaluation: dict[str, list[float]]) -> dict[str, float]:
        """Learn from an evaluation of the rewards, by name, one number per prompt; returns what to log."""
        return {}

    def learn_from_gradients(self, gradients: Tensor) -> dict[str, float]:
        """Learn from the policy gradient of the global rollout in each stream of `needs_gradients` [n, parameters];
        returns what to log."""
        return {}

    def set_thresholds(self, thresholds: dict[str, float]) -> None:
        """Of a weighting with thresholds: go on with others, by the name of the reward; what was learned stays."""
        raise ConfigError(f"{type(self).__name__} has no thresholds")

    def restart(self) -> None:
        """Of a weighting with thresholds: forget what was learned, for a policy that starts again."""
        raise ConfigError(f"{type(self).__name__} has no thresholds")

    def state_dict(self) -> dict:
        return {"flat": dict(self.flat)}

    def load_state_dict(self, state: dict) -> None:
        self.flat = state["flat"]


class FixedWeights(Weighting):
    """One stream: sum_i w_i r_i over the rewards that apply."""

    needs_all = False

    def scores(self, rewards: dict[str, float]) -> dict[str, float]:
        return {TASK: weighted_sum(rewards, self.reward_weights)}


class DecoupledWeights(Weighting):
    """GDPO (arXiv 2601.05242): a stream for each reward, so that each is compared with its group apart; the weighted
    sum of their advantages is scaled to deviation 1."""

    scaled = True

    def __init__(self, names: list[str], weights: list[float], options: Any = None):
        super().__init__(names, weights, options)
        self.streams = [StreamSpec(name) for name in names]

    def scores(self, rewards: dict[str, float]) -> dict[str, float]:
        return {name: rewards[name] for name in self.reward_weights}

    def weights(self) -> list[float]:
        return list(self.reward_weights.values())

    @property
    def kl_weight(self) -> float:
        return 1.0


OWN: dict[type[Section], type[Weighting]] = {}  # weightings of users, by the class of their options


def register_weighting(name: str, weighting: Any = None) -> Any:
    """Adds a weighting of yours, as a call or as a decorator: `dynamic_weights: {type: <name>, ...}` makes it, with the
    further keys as its options (`section`)."""
    if weighting is None:
        return lambda cls: register_weighting(name, cls)
    if name in DYNAMIC_WEIGHTS.kinds and not defined_again(OWN.get(DYNAMIC_WEIGHTS.kinds[name]), weighting):
        raise ConfigError(f"there is a weighting {name!r} already: give yours another name")
    if not (isinstance(weighting, type) and issubclass(weighting, Weighting)):
        raise ConfigError(f"weighting {name!r} must be a subclass of Weighting, got {weighting!r}")
    # with the type as a field, as ours have it: a configuration that is written down has to name the weighting
    make: Any = create_model  # mypy would read the call as a class statement
    section = make(f"{weighting.__name__}Section", __base__=weighting.section, type=(Literal[name], ...))
    section.label = f"type {name}"
    DYNAMIC_WEIGHTS.kinds[name], OWN[section] = section, weighting
    return weighting


def make_weighting(reward_weights: dict[str, float], args: Any) -> Weighting:
    """The weighting that a configuration (`OnPolicyConfig`) asks for. ConfigError for two streams of one name, of which
    one would have the scores of the other, for a KL that no stream has, and for gradient checkpointing under which
    single rewards have no gradients."""
    weighting = _made(reward_weights, args)
    in_loss = args.kl_in == "loss" and type(weighting).kl_weight is not Weighting.kl_weight
    if args.beta and not in_loss and not any(stream.kl for stream in weighting.streams):
        raise ConfigError(
            f"beta is {args.beta:g}, and no stream of {type(weighting).__name__} has the KL, which would be ignored: "
            "set beta: 0, or give a StreamSpec kl=1",
            key="beta",
        )
    if weighting.needs_gradients and reentrant(args):
        raise ConfigError(
            f"gradient_checkpointing_kwargs: with use_reentrant: true the gradients of single rewards, by which "
            f"{type(weighting).__name__} sets its weights, cannot be computed: leave it out",
            key="gradient_checkpointing_kwargs",
        )
    names = [stream.name for stream in weighting.streams]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"a reward is called {twice[0]}, as another stream of {type(weighting).__name__} is: give the reward "
            "another name"
        )
    return weighting


def _made(reward_weights: dict[str, float], args: Any) -> Weighting:
    from align.trainers.weighting.constrained import (
        ConstrainedWeights,
        RewardStreams,
        SatisficingPerEpisode,
        SatisficingWeights,
    )
    from align.trainers.weighting.dynamic import GradientWeights, HypervolumeWeights
    from align.trainers.weighting.options import check_constraints

    names, weights = list(reward_weights), list(reward_weights.values())
    dynamic = args.sections.get("dynamic_weights")
    if dynamic is not None:
        kinds: dict[type[Section], type[Weighting]] = {
            HypervolumeSection: HypervolumeWeights,
            GradientSection: GradientWeights,
            **OWN,
        }
        return kinds[type(dynamic)](names, weights, dynamic)
    options = check_constraints(args)
    if args.multi_objective_aggregation == "normalize_then_sum":
        return DecoupledWeights(names, weights)
    if options is None:
        return FixedWeights(names, weights)
    if options.task_apart:
        return RewardStreams(names, weights, options)
    forms = {"squared": SatisficingWeights, "squared_per_episode": SatisficingPerEpisode}
    if options.form in forms:
        return forms[options.form](names, weights, options)
    held = ConstrainedWeights(names, weights, options)
    if not held.task and not args.beta:
        held.messages.append(
            "every reward is constrained, and beta is 0: there is no task beside the constraints, and nothing keeps "
            "the policy near the reference once they hold. Set beta above 0, or name task_rewards"
        )
    return held
