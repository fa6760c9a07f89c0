"""What stands around the on-policy loop: the engine's weights, checks, evaluations and checkpoints."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

from align.data.limits import check_reads, known_tokens, longest_of
from align.distributed.ranks import in_all
from align.errors import ConfigError
from align.modeling.fingerprint import mark
from align.modeling.load import Reference
from align.modeling.rotary import choose_factors
from align.objectives.policy_loss import PolicyLoss
from align.reward_models.base import Reward, within
from align.reward_models.vllm_server import VllmReward
from align.trainers.core.micro_batches import MicroBatchLists
from align.trainers.core.moving_reference import MovingReference
from align.trainers.core.ranks import Ranks
from align.trainers.core.reference_checks import (
    check_reference,
    check_same_start,
    computes_exactly,
    logp_tolerance,
    named_reference_identity,
    reference_probe,
)
from align.trainers.on_policy.ahead import RolloutsAhead
from align.trainers.on_policy.buffer import RolloutBuffer, check_position
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.critic import CriticLearner
from align.trainers.on_policy.engine import SyncedEngine
from align.trainers.on_policy.entropy import EntropyBonus
from align.trainers.on_policy.episodes import Episodes
from align.trainers.on_policy.estimators import Estimator
from align.trainers.on_policy.evaluation import EvaluationFile, PolicyEvaluator, one_set, sets_of
from align.trainers.on_policy.forward import ForwardPasses
from align.trainers.on_policy.kl_coefficient import KLCoefficient
from align.trainers.on_policy.metrics import OnPolicyMetrics
from align.trainers.on_policy.objective import policy_objective
from align.trainers.on_policy.pipeline import RolloutPipeline
from align.trainers.on_policy.reward_funcs import rewards_given
from align.trainers.on_policy.rewards import RewardColumns, gold_columns
from align.trainers.on_policy.samples import Sample, tokenized_prompts
from align.trainers.on_policy.shown import ShownCompletions
from align.trainers.on_policy.stopping import StopRule
from align.trainers.weighting.base import Weighting, make_weighting
from align.trainers.weighting.search import StartPolicy, ThresholdSearch


class OnPolicyBase(MicroBatchLists, Trainer):
    """A trainer whose parts, named below, `OnPolicyTrainer` makes."""

    args: OnPolicyConfig
    model: nn.Module
    rewards: RewardColumns
    gold: RewardColumns | None
    weighting: Weighting
    kl: KLCoefficient
    reference: Reference | None
    check_start: bool
    buffer: RolloutBuffer | None = None
    restored: bool  # whether the state of the checkpoint that is resumed has been loaded
    critic: CriticLearner | None
    engine: SyncedEngine
    entropy: EntropyBonus
    episodes: Episodes | None
    forward: ForwardPasses
    estimator: Estimator
    evaluator: PolicyEvaluator
    evaluations: EvaluationFile
    ahead: RolloutsAhead
    pipeline: RolloutPipeline
    metrics: OnPolicyMetrics
    moving: MovingReference | None
    ranks: Ranks
    search: ThresholdSearch | None
    shown: ShownCompletions
    stop: StopRule | None
    tokenize: Callable
    """Prompts, to be evaluated on."""
    tokenize_rows: Callable
    """The rows to train on."""
    tokenized_rows: ClassVar[Callable] = staticmethod(tokenized_prompts)

    def take_rewards(self, args: OnPolicyConfig, tokenizer, reward, gold_reward, reward_funcs, classes) -> None:
        """The rewards, among them the environment's, what becomes of them, and how prompts are tokenised."""
        episodes = self.episodes
        own, schemas = ([], []) if episodes is None else (episodes.rewards, episodes.schemas)
        given = rewards_given(reward, reward_funcs, classes, tokenizer, own)
        self.rewards = RewardColumns(given, args.reward_weights, tokenizer=tokenizer)
        self.gold = gold_columns(gold_reward, tokenizer)
        self.weighting = make_weighting(self.rewards.weights, args)
        renders = tokenizer if episodes is None else episodes.tokenizer
        talks_with = None if episodes is None else episodes.environments
        known: dict[str, Any] = {"tokenizer": renders, "args": args, "tools": schemas, "environments": talks_with}
        self.tokenize, self.tokenize_rows = partial(tokenized_prompts, **known), partial(self.tokenized_rows, **known)

    @property
    def longest_row(self) -> int | None:
        return self.args.max_prompt_length + self.args.max_completion_length

    def _check_rows(self) -> None:
        super()._check_rows()
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        judging = [*self.rewards.rewards, *(self.gold.rewards if self.gold is not None else ())]
        self._check_room(self.rewards.rewards, [self.train_dataset])
        self._check_room(judging, list(evaluated.values()))

    def _check_room(self, rewards: list[Reward], datasets: list) -> None:
        """A reward model that takes less than what will be drawn would end the run when a long prompt comes."""
        known = [dataset for dataset in datasets if isinstance(dataset, Dataset) and len(dataset)]
        for dataset in known:
            prompt, talks = longest_of(dataset, "prompt_ids"), isinstance(dataset[0]["prompt"], list)
            for reward in rewards:
                reward.check_room(prompt, self.args.max_completion_length, conversational=talks)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        of_training = not any(key.startswith("eval_") for key in logs)
        super().log(logs, start_time)
        columns, rows = self.shown.take(self.state.global_step) if of_training else ([], [])
        if rows:
            self.log_table("train_completions", columns, rows)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "predict: a policy has completions, drawn anew each time, and no predictions of rows: `evaluate(rows)` "
            "draws and scores them, and `align generate` writes them into a file (docs/using.md)"
        )

    def sync_engine(self) -> None:
        self.ahead.wait()
        self.engine.sync(self.accelerator.unwrap_model(self.model), self.state.global_step)

    def join_refill(self, step: int) -> None:
        """Where others draw and score again: an engine that is shared, and reward models on some ranks."""
        self.pipeline.draw([], [], step)
        self.rewards.scores([])

    def check_logps(self, logps: Tensor, batch: dict[str, Tensor]) -> None:
        """The trained policy must give the log-probs of the one that sampled, and at step 0 those of the reference."""
        if not batch["completion_mask"].any():
            return  # all of its samples are left out
        tolerance, step = logp_tolerance(self.accelerator, self.model), self.state.global_step
        limits = self.engine.gap_limits(tolerance)
        self.metrics.engine_agrees(
            logps,
            batch,
            limits=limits,
            step=step + 1,
            engine=self.engine.name,
            truncated=self.pipeline.requests[0].truncates,
            judged=not (self.pipeline.requests[0].penalises or (self.buffer is not None and self.buffer.stale)),
        )
        if self.untrained and self.check_start and self.args.beta:
            dropout = self.metrics.dropout
            check_same_start(logps, batch["ref_logps"], batch["completion_mask"], tolerance, dropout=dropout)

    def token_losses(self, logps: Tensor, advantages: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, PolicyLoss]:
        """The loss of every token [B, L], with gradient and with the KL where that is in the loss, and the surrogate
        for the log. A policy loss of your own overrides it.

        logps: of the policy that is trained, at the run's temperature, [B, L]. advantages: mixed, [B, L]. batch:
        `completion_mask`, `engine_logps`, `ref_logps` where there is a reference, `old_logps` where several steps are
        made from a rollout (with one the policy is its own), each [B, L].
        """
        coefficient = self.kl.value * self.weighting.kl_weight
        return policy_objective(logps, advantages, batch, self.args, kl_coefficient=coefficient)

    @property
    def entropy_coef(self) -> float:
        """The coefficient of the entropy bonus now (TRL's name)."""
        return self.entropy.coefficient

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's model, None where it is the policy with its adapter off or there is none (TRL's name)."""
        return None if self.reference is None or self.reference.adapter_off else self.reference.model

    def check_reads(self, model: nn.Module | None, name: str) -> None:
        """ConfigError for a model that is named beside the policy and could not read what the policy writes."""
        if model is None:
            return
        # rows of the embeddings beyond the tokenizer are padding, of which models have unlike numbers
        tokens = min(known_tokens(self.model), len(self.processing_class))
        longest = self.args.max_prompt_length + self.args.max_completion_length
        choose_factors(model, longest)
        check_reads(model, name, tokens=tokens, length=longest)

    @property
    def reward_processing_classes(self) -> list:
        """The tokenizers of the rewards that are classifiers, None of the others (TRL's name)."""
        return [getattr(reward, "tokenizer", None) for reward in self.rewards.rewards]

    @property
    def reward_funcs(self) -> list:
        """The rewards, an environment's own last (TRL's name)."""
        return self.rewards.rewards

    @property
    def reward_func_names(self) -> list[str]:
        """TRL's name for the rewards' names."""
        return self.rewards.names

    @property
    def reward_weights(self) -> Tensor:
        """In the order of `reward_funcs` (TRL's name)."""
        return torch.tensor(list(self.rewards.weights.values()))

    @property
    def tools(self) -> list[Callable]:
        """What the policy may call, the methods of each environment among them (TRL's name)."""
        return [] if self.episodes is None else self.episodes.environments.functions

    @property
    def finished(self) -> bool:
        """As in TrainerMixin, and where `stop_at` ends the run."""
        return super().finished or (self.stop is not None and self.stop.reason is not None)

    def start_policy(self) -> StartPolicy:
        """What a search of thresholds goes back to."""
        beside = [] if self.critic is None else [(self.critic.model, self.critic.optimizer)]
        return StartPolicy(self.model, self.engine.forget, beside=beside, controllers=[self.kl, self.entropy])

    @property
    def start_step(self) -> int:
        """The step at which the policy was the first one: 0, but in a search that restores it."""
        return 0 if self.search is None else self.search.start_step

    # ---- log-probs of a rollout --------------------------------------------------------------------------------------

    def fill_logps(self, parts: list[list[Sample]]) -> None:
        """Give the samples their log-probs under the reference and, where it is asked for, under the policy."""
        if self.args.beta:
            assert self.reference is not None  # held wherever beta is not 0
            with self.phase("reference"):
                self.forward.fill(parts, "ref_logps", self.forward.reference_logps(self.reference))
        if self.args.top_entropy_quantile < 1:
            with self.phase("old_logps"):
                self.forward.fill_old(parts, self.model)
        elif self.needs_old_logps():
            with self.phase("old_logps"):
                self.forward.fill(parts, "old_logps", self.forward.policy_logps(self.model))

    def needs_old_logps(self) -> bool:
        """Whether the policy's log-probs before the rollout's first step are computed."""
        return self.args.steps_per_rollout > 1 or self.kl_needs_policy()

    def kl_needs_policy(self) -> bool:
        """Whether the KL in the reward needs a pass of the policy beside that of the reference.

        In float32 the engine's log-probs serve as well. In half precision they differ from any of the trainer's by
        rounding, which the sum over a long completion would take for a KL; and where drawing is truncated or penalised,
        they are those of that distribution; those of a rollout drawn ahead are of older weights.
        """
        exact = computes_exactly(self.accelerator, self.model) and self.args.engine_options.dtype in (None, "float32")
        asked = self.pipeline.requests[0]
        exact = exact and not asked.truncates and not asked.penalises and not self.ahead.on
        return not exact and (self.kl.adapts or (self.args.kl_in == "reward" and self.args.beta > 0))

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_metrics(self):
        learns = type(self.weighting).observe is not Weighting.observe  # and may add what it has learned
        more = learns or self.reference is None or any(reward.may_log for reward in self.rewards.rewards)
        return None if more else ["loss", *self.evaluator.measured]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Sample from the policy at the training temperature on the evaluation prompts, score, and log the means; the
        loss among them is what the run minimises, `beta` times the KL per sequence less the score.

        The evaluation file takes what training and, after it, calls without `eval_dataset` (prompts, all of which are
        used) evaluate, once per step; of several sets (a dict; metrics `eval_<name>_...`) the first.
        """
        if (sets := sets_of(self.eval_dataset, eval_dataset)) is not None:
            found = (self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}") for name, rows in sets.items())
            return {key: value for metrics in found for key, value in metrics.items()}
        dataset, own = one_set(self.eval_dataset, eval_dataset, self.tokenize)
        if not own:
            self.check_other(dataset)
        if self.reference is None:
            raise ConfigError(
                "with beta: 0 and no eval_dataset the trainer holds no reference, which an evaluation measures the KL "
                "to: pass eval_dataset when the trainer is made"
            )
        with self.evaluating():
            self.sync_engine()
            with self.phase("evaluate"):
                rows = self.evaluator.evaluate(dataset, self.model, self.reference)
        self.engine.rest()
        measured = self.evaluator.measured
        means = {name: sum(row[name] for row in rows) / len(rows) for name in measured}
        means["loss"] = (self.args.beta or 0.0) * means["kl"] - means["proxy"]
        metrics = {f"{metric_key_prefix}_{name}": v for name, v in {**means, **self.evaluator.logged}.items()}
        if own and self.is_in_train:
            learned = self.weighting.observe({n: [row[f"rewards/{n}"] for row in rows] for n in self.rewards.names})
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in learned.items()}
        self.log(metrics)
        if own:
            names, table = self.evaluations.write(self.state.global_step, rows, measured)
            if table:
                self.log_table("completions", names, table)
        if own and self.is_in_train and self.stop is not None:
            self.stop.observe(rows, self.state, self.control)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        before = self.state.best_global_step
        best = super()._determine_best_metric(metrics, trial)
        return best if self.stop is None else self.stop.chosen(best, before, self.state)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def own_parts(self) -> dict[str, Any]:
        talks = {} if self.episodes is None else self.episodes.environments.own_parts
        return super().own_parts() | talks | {"estimator": type(self.estimator), "weighting": type(self.weighting)}

    def further_identity(self) -> dict:
        columns = {"rewards": self.rewards} | ({} if self.gold is None else {"gold_reward": self.gold})
        rewards = {key: {reward.name: mark(reward) for reward in value.rewards} for key, value in columns.items()}
        return rewards | named_reference_identity(self.reference, not self.check_start)

    def further_facts(self) -> dict[str, str]:
        weights = self.rewards.weights.items()
        facts = {"rewards": ", ".join(f"{reward} (weight {weight:g})" for reward, weight in weights)}
        return facts if self.gold is None else facts | {"gold reward": f"{self.gold.name}, which judges only"}

    def extra_state(self) -> dict:
        inside = self.state.global_step % self.args.steps_per_rollout != 0
        return {
            "reference": None if self.reference is None else reference_probe(self.reference, self.args.device),
            "served": [None if one.known is None else one.known.tolist() for one in self._served()],
            "weighting": self.weighting.state_dict(),
            "kl_controller": self.kl.state_dict(),
            "search": None if self.search is None else self.search.state_dict(),
            "stop": None if self.stop is None else self.stop.state_dict(),
            "evaluated": self.evaluations.last_step,
            "ahead": self.ahead.state_dict(),
            "entropy_bonus": self.entropy.state_dict(),
            "buffer": self.buffer.state_dict(self.ranks.count) if inside and self.buffer is not None else None,
        }

    def restore(self) -> bool:
        """Load the state of the checkpoint that this run is resumed from, unless that is done; True if it was not."""
        if self.resumed is None or self.restored:
            return False
        self.restored = True
        self.load_state(self.resumed.state, self.resumed.folder)
        return True

    def load_state(self, state: dict, folder: Path) -> None:
        """Restore what a checkpoint holds beyond model and optimiser: `extra_state`, and the files in its folder."""
        if self.moving is not None:
            self.moving.load(folder)
        changes = {name.partition(".")[0] for name in self.args.resume_changes or []}
        if not changes & {"rewards", "gold_reward"}:
            in_all(lambda: self._check_served(state.get("served") or []))
        if self.reference is not None and state["reference"] is not None and "reference" not in changes:
            probe = reference_probe(self.reference, self.args.device)
            check_reference(probe, state["reference"], logp_tolerance(self.accelerator, self.model))
        self.weighting.load_state_dict(state["weighting"])
        self.kl.load_state_dict(state["kl_controller"])
        if self.search is not None:
            self.search.load_state_dict(state["search"])
        if self.stop is not None:
            self.stop.load_state_dict(state.get("stop"))
        if state["buffer"] is not None:
            self.buffer = RolloutBuffer.from_state(state["buffer"], self.args.seed, processes=self.ranks.count)
        self.ahead.load_state_dict(state.get("ahead"))
        self.entropy.load_state_dict(state.get("entropy_bonus"))
        check_position(self.buffer, self.state.global_step, self.args.steps_per_rollout)
        if self.critic is not None:
            self.critic.load(folder)

    def _served(self) -> list[VllmReward]:
        rewards = [*self.rewards.rewards, *(() if self.gold is None else self.gold.rewards)]
        return [reward for reward in within(rewards) if isinstance(reward, VllmReward)]

    def _check_served(self, before: list[list[float] | None]) -> None:
        for reward, known in zip(self._served(), before, strict=False):  # none of an older version
            reward.check_as_before(known)

    def save_further_files(self, folder: Path) -> None:
        if self.critic is not None:
            self.critic.save(folder)
        if self.moving is not None:
            self.moving.save(folder, writes=self.args.should_save)

    def close(self) -> None:
        """Free the rollout engine that the trainer made. It can go on: it makes a new one when it needs it."""
        self.ahead.stop()
        self.engine.close()
