"""Options that every on-policy method has."""

from dataclasses import dataclass, field, fields
from typing import Any

from align.config.sections import plain
from align.errors import ConfigError
from align.objectives.controllers import AdaptiveKL
from align.objectives.policy_loss import AGGREGATIONS
from align.rollout import RolloutOptions, rollout_options
from align.rollout.types import SamplingParams
from align.trainers.core.batching import BatchingOptions
from align.trainers.core.options import BaseConfig
from align.trainers.core.reference_checks import check_no_noise
from align.trainers.on_policy.ahead import check_ahead
from align.trainers.on_policy.estimators import make_estimator
from align.trainers.on_policy.loss_options import check_loss_options, check_used, take_delta
from align.trainers.on_policy.loss_types import LOSS_TYPES, resolve_loss_type
from align.trainers.on_policy.sampling_options import SamplingOptions
from align.trainers.on_policy.stopping import check_stop, prepare_stop
from align.trainers.on_policy.trl_names import take_engine, take_rollouts
from align.trainers.weighting.dynamic import check_dynamic_weights
from align.trainers.weighting.options import check_constraints
from align.trainers.weighting.search import check_search
from align.trainers.weighting.sections import (
    MULTIPLIERS,
    parse_constraints,
    parse_dynamic_weights,
    parse_search,
    parse_stop,
)

RATIO_LEVELS = ("token", "sequence", "sequence_sum")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SECTIONS = {
    "constraints": parse_constraints,
    "multipliers": MULTIPLIERS.parse,
    "dynamic_weights": parse_dynamic_weights,
    "threshold_search": parse_search,
    "stop_at": parse_stop,
}

ESTIMATOR_HELP = {
    "help": "How advantages are estimated: a registered name (`register_estimator`), or path/file.py:Class. Default: "
    "the method's own."
}


@dataclass
class OnPolicyConfig(BatchingOptions, SamplingOptions, BaseConfig):
    """Options of every on-policy method. `per_device_train_batch_size` counts prompts.

    sections: the nested options (`constraints` ...) that are set, by name, checked and typed
    (`align.trainers.weighting.sections`). The fields keep them as plain values, for what writes a configuration down.
    rollout: always a `RolloutOptions` once the configuration is made.
    """

    # ---- rollouts
    num_generations: int = field(default=1, metadata={"help": "Sampled completions per prompt and rollout."})
    max_prompt_length: int = field(
        default=512,
        metadata={
            "help": "Longer prompts are bad rows (tokens). The default is lowered to what the model's positions leave "
            "beside a completion."
        },
    )
    rollout: RolloutOptions | dict[str, Any] | str = field(
        default=RolloutOptions(),
        metadata={
            "help": "The engine that completes prompts: {backend, max_num_seqs, dtype, ...} or the back-end's name "
            "alone (docs/rollouts.md)."
        },
    )
    rollout_backend: str | None = field(
        default=None, metadata={"help": "Short for rollout: {backend: ...}, where nothing else of the engine is set."}
    )
    rollouts_ahead: int = field(
        default=0,
        metadata={
            "help": "1: the engine draws the next rollout while this one is trained on, from the weights of this one. "
            "Needs rollout: {backend: server, ...} and rollout_correction (docs/on_policy.md)."
        },
    )
    partial_rollouts: int = field(
        default=1,
        metadata={
            "help": "Draw the tokens of a completion in up to so many parts, each by the weights of its time, beside "
            "those of the rollouts before it, so that no step waits for a whole long completion. Needs "
            "rollout_correction (docs/on_policy.md)."
        },
    )
    # ---- objective
    estimator: str = field(default="", metadata=ESTIMATOR_HELP)
    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward; their weighted sum is maximised. Default: all 1."}
    )
    beta: float = field(default=0.05, metadata={"help": "Coefficient of the KL to the reference, nats."})
    kl_in: str = field(
        default="reward",
        metadata={
            "help": "reward: -beta * k1 on every token of the reward, as the sampling policy had it; loss: beta * KL "
            "estimate added to the loss."
        },
    )
    kl_estimator: str = field(
        default="k2",
        metadata={"help": "With kl_in: loss. k2 has the reverse KL's gradient; k3 is what GRPO published."},
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Adapt beta so that the KL per sequence (nats) stays at this (Ziegler et al. 2019)."},
    )
    kl_horizon: float = field(default=10_000, metadata={"help": "With kl_target: episodes over which beta adapts."})
    kl_gain: float | None = field(
        default=None,
        metadata={
            "help": "With kl_target: how strongly beta follows per rollout, a constant (0.1 in Moskovitz et al. 2023) "
            "instead of the rollout's share of kl_horizon."
        },
    )
    loss_aggregation: str = field(
        default="sequence_sum",
        metadata={
            "help": "sequence_sum: sum over tokens, mean over sequences (the policy gradient); token_mean: divide by "
            "the tokens of the step; sequence_mean: mean of each sequence's mean (GRPO); constant: divide by sequences "
            "x max_completion_length (Dr. GRPO). Always over the whole optimiser step."
        },
    )
    loss_type: str | None = field(
        default=None,
        metadata={
            "help": f"TRL's name for the loss: {', '.join(LOSS_TYPES)}. Sets loss_aggregation; cispo, sapo and "
            "vespo also weigh the tokens otherwise than the clipped surrogate (docs/on_policy.md). Default: the "
            "surrogate, and loss_aggregation as it is."
        },
    )
    constraints: list[dict] | None = field(
        default=None,
        metadata={
            "help": "Rewards to be held at thresholds: a list of {reward, direction: at_least | at_most | equal, "
            "threshold} (docs/constrained.md)."
        },
    )
    multipliers: dict | None = field(
        default=None,
        metadata={"help": "With constraints: form, learning_rate, momentum, bounds ... of their multipliers."},
    )
    task_rewards: list[str] | None = field(
        default=None,
        metadata={
            "help": "With constraints: names of the rewards whose weighted sum is maximised. Default: those that no "
            "constraint holds; with none the task is to stay close to the reference."
        },
    )
    dynamic_weights: dict | None = field(
        default=None,
        metadata={
            "help": "Weights of the rewards that change while training: {type: hypervolume} or {type: gradient, "
            "learning_rate, mu, parameters} (docs/constrained.md)."
        },
    )
    threshold_search: dict | None = field(
        default=None,
        metadata={
            "help": "Find the thresholds of `equal` constraints within this run, by Nelder-Mead on the gold score: "
            "{start, reached, budget, steps, ...} (docs/constrained.md)."
        },
    )
    # ---- updates
    num_mini_batches: int = field(
        default=1,
        metadata={"help": "Optimiser steps per pass over a rollout; it is made of so many times the step's prompts."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over each rollout (PPO's epochs)."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip of the probability ratio, below 1."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Clip above 1. Default: epsilon."})
    dual_clip: float | None = field(default=None, metadata={"help": "Cap of a bad action's loss, above 1; 3 is usual."})
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "Level of the probability ratio: token; sequence, the geometric mean of the tokens' (GSPO's); "
            "sequence_sum, their product."
        },
    )
    rollout_correction: str = field(
        default="none",
        metadata={"help": f"Importance weights against an engine that rounds differently: {', '.join(CORRECTIONS)}."},
    )
    rollout_correction_high: float = field(default=3.0, metadata={"help": "Largest importance weight."})
    rollout_correction_low: float | None = field(default=None, metadata={"help": "Smallest one. Default: no bound."})
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Cut an optimiser step's samples into micro-batches of at most so many tokens (padding counted) "
            "instead of per_device_train_batch_size prompts with all of their samples. Does not change the loss."
        },
    )
    forward_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "The same for passes without gradient (reference, old log-probs, values, evaluation). Default: 4 x "
            "tokens_per_batch, or without it by number of samples."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout makes the policy differ from its rollouts."})
    # ---- evaluation
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step: where curves start."})
    num_eval_prompts: int | None = field(default=256, metadata={"help": "Evaluate on the first so many; None: all."})
    eval_num_generations: int = field(default=1, metadata={"help": "Completions per prompt in an evaluation."})
    num_logged_completions: int = field(default=8, metadata={"help": "Completions shown per evaluation; 0: none."})
    stop_at: dict | None = field(
        default=None,
        metadata={
            "help": "End the run at the peak of the gold score, {gold_peak: {patience: 3}}, or when an ensemble's "
            "members disagree, {disagreement: {limit}} (docs/overoptimization.md)."
        },
    )

    @property
    def engine_options(self) -> RolloutOptions:
        """The section `rollout`, typed."""
        return rollout_options(self.rollout)

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps made from one rollout."""
        return self.num_mini_batches * self.num_iterations

    @property
    def prompts_per_rollout(self) -> int:
        """Of all processes."""
        per_step = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
        return per_step * self.num_mini_batches

    @property
    def whitens(self) -> bool:
        """Whether the method itself gives advantages mean 0 and deviation 1 over the rollout."""
        return make_estimator(self).whitens

    @property
    def cancels_scale(self) -> bool:
        """Whether a factor on all scores cancels from the advantages."""
        return make_estimator(self).cancels_scale

    def to_dict(self) -> dict[str, Any]:
        """transformers': the options as JSON has them."""
        return {**super().to_dict(), "rollout": plain(self.rollout)}

    def __post_init__(self):
        prepare_stop(self)
        super().__post_init__()
        check_no_noise(self)
        check_choices(self)
        take_rollouts(self)
        take_delta(self)
        self.resolve_loss_type()
        if self.tokens_per_batch is not None and self.forward_tokens_per_batch is None:
            self.forward_tokens_per_batch = 4 * self.tokens_per_batch
        given = {name: getattr(self, name) for name in SECTIONS}
        self.sections = {name: SECTIONS[name](value, name) for name, value in given.items() if value is not None}
        for name, section in self.sections.items():
            setattr(self, name, plain(section))
        take_engine(self)
        self.rollout = rollout_options(self.rollout)
        if self.max_prompt_length != type(self).max_prompt_length:  # the default may be lowered to fit the model
            self.check_budgets()
        check_kl(self)
        check_correction(self)
        check_estimator(self)
        check_penalty(self)
        check_loss_options(self)
        check_used(self)
        check_ahead(self)
        check_constraints(self)
        check_dynamic_weights(self)
        check_search(self)
        check_stop(self)

    def check_budgets(self) -> None:
        """Raises `ConfigError` for a budget of tokens that one completion may exceed."""
        longest = self.max_prompt_length + self.max_completion_length
        for name in ("tokens_per_batch", "forward_tokens_per_batch"):
            budget = getattr(self, name)
            if budget is not None and budget < longest:
                raise ConfigError(
                    f"{name} is {budget}, and one completion with its prompt may have {longest} tokens "
                    f"(max_prompt_length + max_completion_length): set {name} to at least {longest}, or lower these",
                    key=name,
                )

    def resolve_loss_type(self) -> None:
        """What `loss_type` says of the other options."""
        default_aggregation: Any = next(f.default for f in fields(self) if f.name == "loss_aggregation")
        self.loss_aggregation = resolve_loss_type(self, default_aggregation)


def check_choices(args: OnPolicyConfig) -> None:
    """Raises `ConfigError` for a word that is none of an option's."""
    for name, valid in {
        "loss_aggregation": AGGREGATIONS,
        "kl_in": ("reward", "loss"),
        "kl_estimator": ("k2", "k3"),
        "importance_sampling_level": RATIO_LEVELS,
        "rollout_correction": CORRECTIONS,
    }.items():
        value = getattr(args, name)
        if value not in valid:
            more = "; the gradient of k1 is zero on average" if value == "k1" else ""
            raise ConfigError(f"{name} must be one of {', '.join(valid)}, got {value!r}{more}", key=name)


def check_kl(args: OnPolicyConfig) -> None:
    """Raises `ConfigError` where beta could not follow the KL as asked."""
    if args.kl_target is not None and not args.beta > 0:
        raise ConfigError("kl_target needs a target and a beta (its starting point) above 0", key="kl_target")
    if args.kl_gain is not None and (args.kl_target is None or not args.kl_gain > 0):
        raise ConfigError(f"kl_gain needs kl_target and a value above 0, got {args.kl_gain}", key="kl_gain")
    if args.kl_gain is not None and args.kl_horizon != 10_000:
        raise ConfigError("kl_gain takes the place of kl_horizon: set one of them", key="kl_gain")
    if args.kl_target is not None:
        controller = AdaptiveKL(args.beta, args.kl_target, args.kl_horizon, gain=args.kl_gain)
        controller.share(args.prompts_per_rollout * args.num_generations)


def check_correction(args: OnPolicyConfig) -> None:
    """Raises `ConfigError` for bounds outside which 1 lies, the weight of a token on which engine and trainer agree."""
    low, high = args.rollout_correction_low, args.rollout_correction_high
    for name, right in (("rollout_correction_high", high >= 1), ("rollout_correction_low", (low or 0) <= 1)):
        if not right:
            raise ConfigError(
                f"{name} is {getattr(args, name):g}, and the weight of a token on which engine and trainer agree is 1, "
                "which would be cut or dropped: rollout_correction_low is at most 1, rollout_correction_high no less",
                key=name,
            )


def check_estimator(args: OnPolicyConfig) -> None:
    """Raises `ConfigError` for options that the estimator, which checks its own, has no use for."""
    estimator = make_estimator(args)
    alone = args.num_generations < 2 and len(estimator.requests(SamplingParams(**args.drawing))) < 2
    if args.dynamic_sampling_rounds and alone:
        raise ConfigError(
            "dynamic_sampling_rounds compares a prompt's completions, and there is one: set num_generations to 2 or "
            "more",
            key="dynamic_sampling_rounds",
        )
    if not estimator.needs_values and args.truncated == "bootstrap":
        raise ConfigError(
            "truncated: bootstrap takes the value of a critic, which only PPO has: use keep, mask or penalise",
            key="truncated",
        )
    if args.importance_sampling_level == "sequence_sum" and args.loss_aggregation != "sequence_mean":
        raise ConfigError(
            "importance_sampling_level: sequence_sum gives every token the whole sequence's ratio, so its loss is the "
            "mean over tokens: set loss_aggregation: sequence_mean",
            key="importance_sampling_level",
        )


def check_penalty(args: OnPolicyConfig) -> None:
    """Raises `ConfigError` where samples of another distribution would be taken for the policy's."""
    if args.repetition_penalty != 1 and args.rollout_correction == "none":
        raise ConfigError(
            "repetition_penalty draws from another distribution than the policy that is trained: set "
            "rollout_correction, such as token_truncate, which weighs the samples by the ratio",
            key="repetition_penalty",
        )
