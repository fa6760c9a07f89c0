"""Online DPO: the losses of DPO's family on pairs that the policy writes itself (Guo et al. 2024, arXiv 2402.04792).

The policy completes each prompt `num_generations` times, rewards rank the completions, and the best and the worst of
them are a pair for the loss. All else is the on-policy loop (`align.trainers.on_policy.loop`).
"""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from align.errors import ConfigError
from align.modeling.completions import completion_logps
from align.objectives.inpo import inpo_reference
from align.objectives.pair_logps import PairLogps
from align.objectives.preference_objective import PreferenceObjective
from align.trainers.core.experts import with_router_loss
from align.trainers.core.trl_options import without_effect
from align.trainers.on_policy.buffer import RolloutBuffer
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.loop import OnPolicyTrainer
from align.trainers.on_policy.pair_batches import PairPlanner
from align.trainers.on_policy.pair_selection import make_pairs
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.samples import Sample
from align.trainers.on_policy.streams import fill_advantages
from align.trainers.pairs.loss_options import PairLossOptions

logger = logging.getLogger(__name__)

PAIRS_ONLY = "leave it out: the loss is of pairs, not of advantages (loss_type, beta)"
RANKED = "reward_weights, whose weighted sum ranks the completions; under constraints use grpo, rloo, remax or ppo"
LOGGED = ("chosen", "rejected", "margins", "accuracies")


def of_loop(default: Any, instead: str) -> Any:
    """An option of the loop that this method does not have: it takes its default alone."""
    return without_effect(default, instead, "Without effect in this method")


@dataclass
class OnlineDPOConfig(PairLossOptions, OnPolicyConfig):  # type: ignore[misc]  # the loss_type and beta of pairs
    """Options of online DPO: those of the on-policy loop for rollouts, those of `align dpo` for the loss."""

    trained_together: ClassVar[int] = PairPlanner.together
    estimator: str = field(
        default="best_worst",
        metadata={
            "help": "Which two of a prompt's completions are its pair: best_worst, or path/file.py:Class of your own, "
            "whose advantages are above 0 for the chosen and below 0 for the rejected one."
        },
    )
    num_generations: int = field(
        default=2, metadata={"help": "Completions per prompt, of which the best and the worst are the pair."}
    )
    old_policy_share: float = field(
        default=0.0,
        metadata={
            "help": "INPO's 1 - tau/eta: the share of the policy before the rollout's first step in what the loss "
            "takes for the reference. With loss_type: ipo_sum and beta: eta it is INPO."
        },
    )
    kl_in: str = of_loop("reward", PAIRS_ONLY)
    kl_estimator: str = of_loop("k2", PAIRS_ONLY)
    kl_target: float | None = of_loop(None, "beta, which stays what it is")
    kl_horizon: float = of_loop(10_000, "beta, which stays what it is")
    kl_gain: float | None = of_loop(None, "beta, which stays what it is")
    loss_aggregation: str = of_loop("sequence_sum", "loss_type: sigmoid_norm or ipo, which divide by lengths")
    constraints: list[dict] | None = of_loop(None, RANKED)
    multipliers: dict | None = of_loop(None, RANKED)
    task_rewards: list[str] | None = of_loop(None, RANKED)
    dynamic_weights: dict | None = of_loop(None, RANKED)
    threshold_search: dict | None = of_loop(None, RANKED)
    epsilon: float = of_loop(0.2, PAIRS_ONLY)
    epsilon_high: float | None = of_loop(None, PAIRS_ONLY)
    dual_clip: float | None = of_loop(None, PAIRS_ONLY)
    importance_sampling_level: str = of_loop("token", PAIRS_ONLY)
    rollouts_ahead: int = of_loop(0, "num_mini_batches, for fewer and larger rollouts")
    partial_rollouts: int = of_loop(1, "num_mini_batches, for fewer and larger rollouts")
    rollout_correction: str = of_loop("none", PAIRS_ONLY)
    rollout_correction_high: float = of_loop(3.0, PAIRS_ONLY)
    rollout_correction_low: float | None = of_loop(None, PAIRS_ONLY)
    delta: float | None = of_loop(None, PAIRS_ONLY)
    off_policy_mask_threshold: float | None = of_loop(None, PAIRS_ONLY)
    use_bias_correction_kl: bool = of_loop(False, PAIRS_ONLY)
    top_entropy_quantile: float = of_loop(1.0, PAIRS_ONLY)
    entropy_coef: float = of_loop(0.0, PAIRS_ONLY)
    use_adaptive_entropy: bool = of_loop(False, PAIRS_ONLY)
    entropy_coef_min: float = of_loop(0.0, PAIRS_ONLY)
    entropy_coef_max: float = of_loop(1.0, PAIRS_ONLY)
    entropy_coef_delta: float = of_loop(0.005, PAIRS_ONLY)
    entropy_target: float = of_loop(0.2, PAIRS_ONLY)
    sapo_temperature_pos: float = of_loop(1.0, PAIRS_ONLY)
    sapo_temperature_neg: float = of_loop(1.05, PAIRS_ONLY)
    vespo_k_pos: float = of_loop(2.0, PAIRS_ONLY)
    vespo_lambda_pos: float = of_loop(3.0, PAIRS_ONLY)
    vespo_k_neg: float = of_loop(3.0, PAIRS_ONLY)
    vespo_lambda_neg: float = of_loop(2.0, PAIRS_ONLY)

    def resolve_loss_type(self) -> None:
        """The names are those of pair losses; there is nothing to resolve."""

    def __post_init__(self):
        super().__post_init__()
        objective = self.objective()
        check_objective(objective)
        if self.beta is None:  # the loop tells by it whether a reference is needed
            self.beta = next((term.options["beta"] for term in objective.terms if "beta" in term.options), None)

    def check_budgets(self) -> None:
        super().check_budgets()
        together = self.trained_together * (self.max_prompt_length + self.max_completion_length)
        if self.tokens_per_batch is not None and self.tokens_per_batch < together:
            raise ConfigError(
                f"tokens_per_batch is {self.tokens_per_batch}, and the {self.trained_together} completions of a "
                f"prompt's pairs, which are in one micro-batch, may have {together} tokens ({self.trained_together} x "
                f"(max_prompt_length + max_completion_length)): set tokens_per_batch to at least {together}",
                key="tokens_per_batch",
            )


def check_objective(objective: PreferenceObjective) -> None:
    """ConfigError for losses that these pairs cannot have."""
    for term in objective.terms:
        loss, why = term.loss, None
        if loss.needs_kl:
            why = "takes the KL over the whole vocabulary, which is not computed for rollouts"
        elif loss.across_pairs or loss.needs_mean_length:
            why = "compares a pair with the others of its batch"
        elif not loss.needs_reference:
            why = "has no reference, and nothing else keeps the policy near its start"
        if why:
            raise ConfigError(
                f"loss_type: {term.name} {why}: use sigmoid, ipo, hinge or another of docs/online.md, or train it "
                "offline (align dpo)",
                key="loss_type",
            )
    if objective.use_weighting:
        raise ConfigError(
            "use_weighting weighs pairs by how likely the policy would have written them; these it has written: leave "
            "it out",
            key="use_weighting",
        )


class OnlineDPOTrainer(OnPolicyTrainer):
    """One policy, a reference, and rewards that rank; arguments as those of `OnPolicyTrainer`.

    The pair of a prompt is the unit of micro-batches, and the loss of an optimiser step the mean over its pairs.
    """

    _tag_names = ["align", "online_dpo"]
    paper = "Guo et al. 2024, arXiv 2402.04792"
    config_class: ClassVar[Any] = OnlineDPOConfig
    planner_class: ClassVar[type[PairPlanner]] = PairPlanner
    args: OnlineDPOConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        taken = sorted(set(self.rewards.names) & set(LOGGED))
        if taken:
            raise ConfigError(
                f"a reward is called {', '.join(taken)}: rewards/{taken[0]} is the loss's own in the log; give the "
                "reward another name"
            )

    @cached_property
    def objective(self) -> PreferenceObjective:
        return self.args.objective()

    def own_parts(self) -> dict[str, Any]:
        return {**super().own_parts(), "loss_type": self.objective.functions}

    def make_rollout(self, prompts: list[dict], indices: list[int]) -> RolloutBuffer:
        """From prompts to pairs that know their log-probs under the reference."""
        args = self.args
        rollout = self.sample_rollout(prompts, indices)
        self.metrics.all(self.rank(rollout))
        pairs = self.pairs_of(rollout, indices)
        self.record_lengths(pairs)
        self.fill_logps(self.planner.plan_forward(pairs, 2 * args.train_batch_size))
        return RolloutBuffer.of(pairs, args.num_mini_batches, args.seed, self.state.global_step)

    def rank(self, rollout: ScoredRollout) -> dict[str, list[float]]:
        """Give every sample the sign by which it is chosen or rejected. Returns the estimator's metrics, and records
        the other ones of the rollout."""
        with self.phase("advantages"):
            found = fill_advantages(rollout, self.estimator, self.weighting, self.ranks, beta=0.0)
        self.metrics.rollout(rollout.samples, self.pipeline.truncation)
        self.shown.keep(rollout.samples)
        self.updates.learn(rollout.samples, self.state.global_step + 1)
        return found

    def pairs_of(self, rollout: ScoredRollout, indices: list[int]) -> list[Sample]:
        """The chosen and the rejected sample of each prompt (`make_pairs`). indices: of the prompts in the rollout's
        global batch."""
        return make_pairs(rollout)

    def record_lengths(self, pairs: list[Sample]) -> None:
        for chosen, rejected in zip(pairs[::2], pairs[1::2], strict=True):
            if not chosen.left_out:
                self.record("pairs/length_chosen_minus_rejected", chosen.written - rejected.written)

    def needs_old_logps(self) -> bool:
        return self.args.old_policy_share > 0

    @with_router_loss(lambda batch, args: int(pairs_kept(batch["completion_mask"]).sum()))
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logps, entropy = completion_logps(model, inputs, temperature=self.args.temperature, return_entropy=True)
        if self.state.global_step % self.args.steps_per_rollout == 0:
            self.check_logps(logps.detach(), inputs)
        self.metrics.update(logps.detach(), entropy, inputs)
        pairs = self.kept_pairs(logps, inputs)
        found = self.objective(pairs)
        found.metrics |= {"logps/chosen": pairs.chosen, "logps/rejected": pairs.rejected}
        values = found.values()
        count = len(values.pop("loss"))
        for name, column in values.items() if count else ():
            self.record(name, column.float().mean(), count)
        # the count is of all ranks, and DDP averages over them
        return found.losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def kept_pairs(self, logps: Tensor, batch: dict[str, Tensor]) -> PairLogps:
        """Of the pairs that count. logps: [2B, L] of the policy, chosen rows and then rejected."""
        mask = batch["completion_mask"]
        rows = pairs_kept(mask).repeat(2)
        reference, share = batch["ref_logps"], self.args.old_policy_share
        if share:
            reference = inpo_reference(reference, batch["old_logps"], share)
        return self.objective.pairs(logps[rows], mask[rows], reference[rows])

    def loss_count(self, samples: list[Sample]) -> Tensor:
        """The pairs of these samples that count, over all processes."""
        count = self.ranks.total(sum(not sample.left_out for sample in samples[:: self.planner_class.together]))
        if not count and self.ranks.index == 0:
            logger.warning(
                "step %d: no prompt has a pair: the scores of its completions are all the same, or they are left out "
                "for want of a score or of their end",
                self.state.global_step + 1,
            )
        return count.clamp(min=1)


def pairs_kept(mask: Tensor) -> Tensor:
    """Which pairs of a micro-batch are not left out, [B]. mask: [2B, L]."""
    return torch.chunk(mask.any(-1), 2)[0]
