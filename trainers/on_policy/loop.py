"""The one on-policy loop: prompts -> rollouts -> reward columns -> streams -> advantages -> updates.

`OnPolicyTrainer` is transformers' Trainer whose batches are made by the policy itself: `get_batch_samples` takes the
micro-batches of an optimiser step from a rollout, and makes one at its first step (`make_rollout`). The work is done by
parts with stated inputs, each in a file of this folder:

    engine      SyncedEngine: a rollout engine with the weights of a step
    pipeline    RolloutPipeline: prompts in, scored samples out
    ahead       RolloutsAhead: draws before it is due, if asked to
    forward     ForwardPasses: log-probs of reference and policy
    estimator   Estimator: from a stream of scores to advantages; the one thing in which methods differ
    weighting   Weighting (trainers/weighting/): which streams there are, and what each counts now
    critic      CriticLearner, for estimators that need values
    planner     BatchPlanner: samples in, micro-batches out
    evaluator   PolicyEvaluator

Every draw is seeded by (seed, step, index of the prompt in the rollout's global batch), so a run does not depend on how
its batches are cut into processes and micro-batches, nor on where it was resumed.
"""

import logging
from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import islice
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor, nn

from align.data.endless import EndlessRows
from align.data.limits import fit_sets
from align.data.streams import is_stream
from align.modeling.completions import completion_logps
from align.modeling.load import reference_of
from align.modeling.prefix_support import enable_shared_prefix, enable_trunk
from align.objectives.policy_loss import aggregate_tokens
from align.rollout.engine import RolloutEngine
from align.rollout.types import SamplingParams
from align.trainers.core.batching import CheckSharedRows, autocast_dtype, resolve_layout
from align.trainers.core.experts import with_router_loss
from align.trainers.core.loading import load_trained, loading_options, tokenizer_of, without_weights
from align.trainers.core.micro_batches import in_lists
from align.trainers.core.moving_reference import moving_reference
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.ahead import RolloutsAhead
from align.trainers.on_policy.base import OnPolicyBase
from align.trainers.on_policy.batches import BatchPlanner
from align.trainers.on_policy.buffer import RolloutBuffer, block_sampler, check_arithmetic, check_stream, take_prompts
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.critic import CriticLearner, CriticStep, make_critic
from align.trainers.on_policy.engine import SyncedEngine, engine_maker
from align.trainers.on_policy.entropy import EntropyBonus, train_high_entropy_tokens
from align.trainers.on_policy.environments import Factory, rows_of
from align.trainers.on_policy.episodes import make_episodes
from align.trainers.on_policy.estimators import make_estimator
from align.trainers.on_policy.evaluation import Curve, EvaluationFile, PolicyEvaluator, eval_prompts
from align.trainers.on_policy.forward import ForwardPasses
from align.trainers.on_policy.kl_coefficient import KLCoefficient
from align.trainers.on_policy.metrics import OnPolicyMetrics
from align.trainers.on_policy.objective import kept_lengths, loss_count
from align.trainers.on_policy.pipeline import RolloutPipeline, ScoredRollout
from align.trainers.on_policy.refill import DynamicSampling
from align.trainers.on_policy.samples import Sample, fit_prompts
from align.trainers.on_policy.self_judges import bind_judges, room_of_judges
from align.trainers.on_policy.shown import ShownCompletions
from align.trainers.on_policy.stopping import make_stop, name_best_metric
from align.trainers.on_policy.streams import checked_losses, fill_advantages, mix
from align.trainers.on_policy.truncation import TruncationRule
from align.trainers.weighting.gradients import gradient_parameters, stream_gradients
from align.trainers.weighting.search import make_search
from align.trainers.weighting.updates import WeightingUpdates

logger = logging.getLogger(__name__)


class OnPolicyTrainer(OnPolicyBase):
    """The loop. `args.estimator` says how advantages are estimated.

    Args:
        model: a model, a folder or a hub name.
        reward: a `Reward`, a function, a spec (docs/rewards.md) or a list of them.
        args: by default the method's options as they are, with the output in ./MODEL-METHOD.
        train_dataset, eval_dataset: prompts (docs/data.md); other columns go to the rewards.
        gold_reward: scored in evaluations only, never trained on.
        ref_model: the reference; by default the policy as it starts (with LoRA: the adapter switched off). With
            `beta: 0` and without `eval_dataset` none is held.
        engine: a `RolloutEngine` to use, and to leave open; by default one is made from the policy.
        reward_funcs, reward_processing_classes: TRL's names for `reward`, and for the tokenizers of its classifiers.
        tools, environment_factory: functions that may be called, and what makes environments (docs/environments.md).
    """

    planner_class: ClassVar[type[BatchPlanner]] = BatchPlanner
    args: OnPolicyConfig

    def __init__(
        self,
        model: str | nn.Module,
        reward: Any = None,
        args: OnPolicyConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        gold_reward: Any = None,
        ref_model: nn.Module | None = None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
        engine: RolloutEngine | None = None,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        tools: list[Callable] | None = None,
        environment_factory: Factory = None,
        quantization_config: Any = None,  # of TRL's scripts: rollouts are of no quantised policy
    ):
        train_dataset = rows_of(train_dataset, args, environment_factory)
        args = self.options(args, model, train_dataset)
        check_stream(args, train_dataset)
        args.remove_unused_columns, args.eval_on_start = False, args.eval_on_start and eval_dataset is not None
        tokenizer = tokenizer_of(args, model, processing_class)
        load = partial(load_trained, args, model, peft_config, loading_options(args, model, quantization_config))
        model = load() if (empty := without_weights(args, model)) is None else empty
        fit_prompts(args, model)
        self.episodes = make_episodes(args, tools, environment_factory, tokenizer)
        self.take_rewards(args, tokenizer, reward, gold_reward, reward_funcs, reward_processing_classes)
        self.estimator = make_estimator(args)
        rows = self.tokenize_rows(train_dataset), eval_prompts(eval_dataset, self.tokenize, args.num_eval_prompts)
        if empty is not None:  # weights are read once the rows are tokenised: of a large model it takes minutes
            fit_sets(empty, args.max_prompt_length + args.max_completion_length, *rows, tokenizer)
            model = load()
        self.kl = KLCoefficient(args.beta, args.kl_target, horizon=args.kl_horizon, gain=args.kl_gain)
        self.check_start, held = ref_model is None, args.beta != 0 or eval_dataset is not None
        # With beta 0 nothing that is trained needs it; an evaluation measures the KL to it.
        self.reference = reference_of(model, ref_model) if held else None
        name_best_metric(args, eval_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=rows[0],
            eval_dataset=rows[1],
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if is_stream(train_dataset):
            self.make_endless(train_dataset)
        self.rewards.trainer_state = lambda: copy(self.state)  # a reward may write in its inputs
        self.model_accepts_loss_kwargs = True  # the losses are normalised by the global count, not by Trainer
        self.ranks, self.metrics = Ranks(self.accelerator), OnPolicyMetrics(self.recorder, self.model)
        self.shown = ShownCompletions(args)
        self._make_passes()
        self._make_rollouts(engine)
        self._make_ends()
        self.moving = moving_reference(self)

    def _make_ends(self) -> None:
        """What may end the run before its last step."""
        args, has_gold = self.args, self.gold is not None
        self.search = make_search(
            args,
            self.weighting,
            has_gold=has_gold and isinstance(self.eval_dataset, Dataset),
            sharded=self.ranks.sharded,
            start=self.start_policy,
        )
        if self.search is not None:
            self.add_callback(self.search)
        ensembles = list(self.evaluator.ensembles)
        self.stop = make_stop(args, has_gold=has_gold, eval_dataset=self.eval_dataset, ensembles=ensembles)

    def _make_passes(self) -> None:
        """What computes log-probs and values: reference, critic and forward passes, in one layout of the batches."""
        args, longest = self.args, self.args.max_prompt_length + self.args.max_completion_length
        models = [self.model, self.ref_model]
        obstacles = (enable_shared_prefix(m, longest, autocast_dtype(args)) for m in models if m is not None)
        shared = resolve_layout(args.batching, obstacles)
        if self.reference is not None:
            self.check_reads(None if self.check_start else self.ref_model, "reference")
            self.reference.prepare(self.accelerator)
        self.critic: CriticLearner | None = None
        if self.estimator.needs_values:
            critic = make_critic(self.model, args, heads=len(self.weighting.streams))
            self.check_reads(critic.backbone if args.critic_model_name_or_path else None, "critic")
            if shared:
                shared = resolve_layout(args.batching, [enable_trunk(critic.backbone, self.model, longest)])
            self.critic = CriticLearner(critic, self.accelerator, args, self.recorder)
            self.add_callback(CriticStep(self.critic, lambda: self.start_step))
        self.entropy = EntropyBonus(args, self.ranks, self.record)
        if self.entropy.on:
            self.add_callback(self.entropy)
        if shared:
            self.add_callback(CheckSharedRows(self))
        tokenizer = self.processing_class
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.planner = self.planner_class(
            padding,
            num_generations=args.num_generations,
            shared_prefix=shared,
            tokens=args.tokens_per_batch,
            forward_tokens=args.forward_tokens_per_batch,
            ranks=self.ranks,
        )
        self.forward = ForwardPasses(self.planner, self._prepare_inputs, args.temperature)

    def _make_rollouts(self, engine: RolloutEngine | None) -> None:
        """What makes and scores completions, in training and evaluation."""
        args, tokenizer = self.args, self.processing_class
        make = engine_maker(
            args, tokenizer, self.accelerator.mixed_precision, room_of_judges(self.reward_funcs, tokenizer, args)
        )
        self.engine = SyncedEngine(make, engine, recorder=self.recorder)
        bind_judges(self.reward_funcs, self.engine, tokenizer, args)
        sampling = SamplingParams(n=args.num_generations, **args.drawing)
        requests = self.estimator.requests(sampling)
        truncation = TruncationRule.of(args)
        truncation.check(self.weighting)
        self.pipeline = RolloutPipeline(
            self.engine,
            tokenizer,
            self.rewards,
            requests,
            seed=args.seed,
            recorder=self.recorder,
            truncation=truncation,
            episodes=self.episodes,
        )
        self.ahead = RolloutsAhead(args, self.pipeline, self.engine, processes=self.ranks.count)
        self.refill = DynamicSampling(
            args.dynamic_sampling_rounds,
            args.prompts_per_rollout,
            self.train_dataset,
            args.seed,
            self.ranks,
            self.recorder,
        )
        self.updates = WeightingUpdates(self.weighting, self.ranks, self.recorder, kl=args.beta > 0)
        self.evaluator = PolicyEvaluator(
            args, self.engine, tokenizer, self.rewards, self.gold, self.forward, self.ranks, self.episodes
        )
        self.evaluations = EvaluationFile(
            args,
            method=type(self).__name__.removesuffix("Trainer").lower(),
            proxy=self.rewards.name,
            gold=self.gold.name if self.gold is not None else None,
        )
        if self.eval_dataset is not None:
            # Before the trackers' own callbacks: TensorBoard closes its writer there.
            curve = Curve(self.evaluations, self._resumed_evaluations, self.log_figure)
            self.callback_handler.callbacks.insert(0, curve)

    def _resumed_evaluations(self) -> tuple[int | None, int | None]:
        return self.resume_step, (self.resume_state or {}).get("evaluated")

    # ---- transformers' hooks ----------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        if not isinstance(self.train_dataset, EndlessRows):
            check_arithmetic(self.args, len(self.train_dataset))
        self.engine.forget()  # its weights may be another run's
        self.evaluations.close()
        self.buffer, self.restored = None, False
        if self.stop is not None:
            self.stop.clear()
        self.ahead.forget()
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.ahead.stop()
        self.restore()  # where no step was left: what is saved now is what had been trained
        self.engine.forget()  # the best checkpoint may have been loaded
        return output

    def _get_train_sampler(self, train_dataset=None):
        if self.args.steps_per_rollout == 1 or isinstance(self.train_dataset, EndlessRows):
            return super()._get_train_sampler(train_dataset)
        return block_sampler(self.args, len(self.train_dataset), lambda: self.state.global_step)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """One optimiser step's micro-batches, from a rollout of the policy as it was at the rollout's first step."""
        if self.finished:  # as in TrainerMixin
            return [], None
        steps = self.args.steps_per_rollout
        position = self.state.global_step % steps
        if self.restore():
            if self.finished:  # `stop_at` had ended it
                self.control.should_training_stop = True
                return [], None
            if position:  # the prompts of the rest of this rollout are in the buffer
                list(islice(epoch_iterator, (steps - position) * num_batches))
        if position == 0:
            take = partial(take_prompts, epoch_iterator, num_batches, self.args)
            left = (self.state.max_steps - self.state.global_step - 1) // steps
            prompts, indices = self.ahead.prompts(take, left)
            if not prompts:
                return [], None
            self.buffer = self.make_rollout(prompts, indices)
        assert self.buffer is not None  # made at the first step, or read from the checkpoint
        samples = self.buffer.mini_batch(position)
        if self.weighting.update_per == "mini_batch":
            self.updates.learn(samples, self.state.global_step + 1)
        self.entropy.begin(samples)
        batches = self.planner.plan(samples, num_batches)
        return in_lists([self.planner.collate(batch) for batch in batches], num_batches), self.loss_count(samples)

    @with_router_loss(lambda batch, args: loss_count(kept_lengths(batch["completion_mask"]), args))
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.ahead.raise_early()
        args, mask = self.args, inputs["completion_mask"]
        logps, entropy = completion_logps(
            model, inputs, temperature=args.temperature, return_entropy=True, entropy_gradient=self.entropy.on
        )
        if self.state.global_step % args.steps_per_rollout == 0:
            self.check_logps(logps.detach(), inputs)
        advantages = mix(inputs["advantages"], self.weighting)
        losses, policy = checked_losses(self.token_losses(logps, advantages, inputs), self)
        self.metrics.update(logps.detach(), entropy.detach(), inputs)
        self.metrics.correction(policy.correction, mask)
        if args.steps_per_rollout > 1:
            self.metrics.surrogate(policy, mask)
        if self.critic is not None:
            self.critic.learn(inputs, num_items_in_batch)
        loss = aggregate_tokens(losses, mask, args.loss_aggregation, num_items_in_batch)
        if self.entropy.on:
            loss = self.entropy.added_to(loss, entropy, mask, loss_count(kept_lengths(mask), args), num_items_in_batch)
        return loss * self.accelerator.num_processes  # the count is of all ranks, and DDP averages over them

    # ---- from prompts to advantages ---------------------------------------------------------------------------------

    def make_rollout(self, prompts: list[dict], indices: list[int]) -> RolloutBuffer:
        """From prompts to samples that know their advantages. indices: of the prompts in the rollout's global batch."""
        args, step = self.args, self.state.global_step
        rollout = self.sample_rollout(prompts, indices)
        samples = rollout.samples
        parts = self.planner.plan_forward(samples, args.train_batch_size * args.num_generations)
        self.fill_logps(parts)
        if self.critic is not None:
            with self.phase("values"):
                if args.truncated == "bootstrap":
                    self.forward.fill_values(parts, self.critic.values)
                else:
                    self.forward.fill(parts, "values", self.critic.values)
        with self.phase("advantages"):
            beta = self.kl.value if args.kl_in == "reward" else 0.0
            self.metrics.all(fill_advantages(rollout, self.estimator, self.weighting, self.ranks, beta))
            if args.top_entropy_quantile < 1:
                train_high_entropy_tokens(samples, args.top_entropy_quantile, self.ranks)
        if self.weighting.needs_gradients:
            with self.phase("objective_gradients"):
                self.updates.learn_from_gradients(self.stream_gradients(self.planner.plan(samples, len(parts))))
        self.metrics.rollout(samples, self.pipeline.truncation)
        self.shown.keep(samples)
        if self.weighting.update_per == "rollout":
            self.updates.learn(samples, step + 1)
        if self.kl.adapts:
            self.kl.follow(samples, self.ranks)
            self.record("beta", self.kl.value if args.kl_in == "loss" else beta)  # what this rollout is trained with
        if args.steps_per_rollout == 1:
            for sample in samples:
                sample.old_logps = None  # they were for the KL: with one step the ratio is exactly 1
        return RolloutBuffer.of(samples, args.num_mini_batches, args.seed, step)

    def sample_rollout(self, prompts: list[dict], indices: list[int]) -> ScoredRollout:
        """Scored samples of these prompts by the policy as it is, and of others where they have no signal."""
        args, step = self.args, self.state.global_step
        version = self.ahead.begin(prompts, step, self.sync_engine)
        rollout = self.pipeline.run(prompts, indices, step, version, self.ahead.draw)
        if args.dynamic_sampling_rounds:
            draw = partial(self.pipeline.run, step=step, weight_version=step)
            join = partial(self.join_refill, step)
            self.refill.fill(rollout, indices, step, self.weighting, draw, join)
        self.engine.rest()
        return rollout

    def stream_gradients(self, parts: list[list[Sample]]) -> Tensor:
        """Of the streams that the weighting learns from, on the global rollout given in micro-batches."""
        model, names = self.accelerator.unwrap_model(self.model), [stream.name for stream in self.weighting.streams]
        return stream_gradients(
            model,
            (self._prepare_inputs(self.planner.collate(part)) for part in parts),
            [names.index(name) for name in self.weighting.needs_gradients],
            gradient_parameters(model, self.weighting.gradient_parameters, self.ranks),
            temperature=self.args.temperature,
            aggregation=self.args.loss_aggregation,
            count=self.loss_count([sample for part in parts for sample in part]),
            ranks=self.ranks,
        )

    def loss_count(self, samples: list[Sample]) -> Tensor:
        """What the loss of these samples is divided by, counted over all processes."""
        lengths = [sample.written for sample in samples if not sample.left_out]
        count = self.ranks.total(loss_count(lengths, self.args))
        if not count and self.ranks.index == 0:
            logger.warning(
                "step %d: all samples are left out of the loss, cut at max_completion_length or without a score",
                self.state.global_step + 1,
            )
        return count.clamp(min=1)
