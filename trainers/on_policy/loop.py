"""The one on-policy loop: prompts -> rollouts -> reward columns -> streams -> advantages -> updates.

`OnPolicyTrainer` is transformers' Trainer whose batches are made by the policy itself. `get_batch_samples`, which
collects the micro-batches of one optimiser step, takes them from a rollout; at the rollout's first step it samples all
prompts in one engine call (`fill_buffer`, the whole way from prompts to advantages). Methods plug in `requests` (what
to sample for a prompt, the baseline included), `set_baselines`, and `estimate` (the advantages of one stream of
scores); the weighting (trainers/weighting/base.py) says which streams there are and mixes them.

Every draw is seeded by (seed, step, place of the prompt in the rollout's global batch), so a run does not depend on how
its batches are cut into processes and micro-batches, nor on where it was resumed.
"""

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed

from align.modeling.completions import completion_logps
from align.modeling.load import disable_dropout, load_policy, load_tokenizer, reference_of
from align.objectives import kl
from align.objectives.controllers import AdaptiveKL
from align.objectives.policy_loss import aggregate_tokens, clipped_policy_loss
from align.objectives.returns import whiten
from align.objectives.rollout_correction import importance_weights, log_ratios
from align.rollout.engine import RolloutEngine
from align.rollout.seeds import derive_seed
from align.rollout.types import SamplingParams
from align.trainers.core.reference_checks import ReferenceChecks
from align.trainers.core.trainer import TrainerMixin
from align.trainers.on_policy.batches import SampleBatches
from align.trainers.on_policy.buffer import RolloutBuffer
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.engine import EngineSync
from align.trainers.on_policy.evaluation import Curve, PolicyEvaluation, eval_prompts
from align.trainers.on_policy.metrics import OnPolicyMetrics
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.rollouts import (
    Sample,
    completion_masks,
    completion_matrix,
    make_samples,
    tokenized_prompts,
)
from align.trainers.on_policy.state import OnPolicyState
from align.trainers.weighting.base import make_weighting
from align.trainers.weighting.search import make_search
from align.trainers.weighting.updates import WeightingUpdates


@dataclass
class Stream:
    """One column of scores and what its advantages are estimated from. N samples (a prompt's side by side), L tokens.

    scores, baselines (None without): [N]. beta: coefficient of the KL inside this stream's reward, 0 for all but the
    task. logps: of the policy that sampled; ref_logps, mask: [N, L]. values: [N, L], of a critic, or None.
    """

    scores: Tensor
    baselines: Tensor | None
    beta: float
    logps: Tensor
    ref_logps: Tensor
    mask: Tensor
    values: Tensor | None


class OnPolicyTrainer(
    EngineSync,
    SampleBatches,
    OnPolicyState,
    WeightingUpdates,
    OnPolicyMetrics,
    PolicyEvaluation,
    ReferenceChecks,
    TrainerMixin,
    Trainer,
):
    """The loop. Subclasses implement `estimate`, and `requests` and `set_baselines` where they need more.

    Args:
        model: a model, a folder or a hub name.
        reward: a `Reward`, a function, a spec (docs/rewards.md) or a list of them.
        train_dataset, eval_dataset: prompts (docs/data.md); other columns go to the rewards.
        gold_reward: scored in evaluations only, never trained on.
        ref_model: the reference; by default the policy as it starts (with LoRA: the adapter switched off).
        engine: a `RolloutEngine` to use, and to leave open; by default one is made from the policy.
    """

    _tag_names = ["align"]

    def __init__(
        self,
        model: str | nn.Module,
        reward: Any,
        args: OnPolicyConfig,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        gold_reward: Any = None,
        ref_model: nn.Module | None = None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
        engine: RolloutEngine | None = None,
    ):
        processing_class = processing_class or load_tokenizer(model)
        set_seed(args.seed)  # a new adapter is drawn at random
        model = load_policy(model, peft_config=peft_config, sharded=True)
        if args.disable_dropout:
            disable_dropout(model)
        self.rewards = RewardColumns(reward, args.reward_weights, tokenizer=processing_class)
        self.gold = RewardColumns(gold_reward, None, tokenizer=processing_class) if gold_reward is not None else None
        self.weighting = make_weighting(self.rewards.names, self.rewards.weights, args)
        self.kl_controller = None
        if args.kl_target is not None:
            self.kl_controller = AdaptiveKL(args.beta, args.kl_target, args.kl_horizon)
        self.check_start = ref_model is None
        self.reference = reference_of(model, ref_model)
        self.engine = engine
        self.owns_engine = engine is None
        self.engine_step = None
        self.eval_writer = None
        self.buffer: RolloutBuffer | None = None
        args.remove_unused_columns = False
        if eval_dataset is None:
            args.eval_on_start = False
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=tokenized_prompts(train_dataset, processing_class, args),
            eval_dataset=None if eval_dataset is None else eval_prompts(eval_dataset, processing_class, args),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # the losses are normalised by the global count, not by Trainer
        self.shares_prefixes = self.enable_shared_prefixes()
        self.reference.prepare(self.accelerator)
        # Before the trackers' own callbacks: TensorBoard closes its writer there.
        self.callback_handler.callbacks.insert(0, Curve(self))
        self.search = make_search(self)

    # ---- what a method plugs in -------------------------------------------------------------------------------------

    def requests(self) -> list[SamplingParams]:
        """The requests made for every prompt, in order. The first is the trained one (`num_generations` samples)."""
        return [
            SamplingParams(
                max_tokens=self.args.max_completion_length,
                n=self.args.num_generations,
                temperature=self.args.temperature,
            )
        ]

    def set_baselines(self, samples: list[Sample], extra: list[list[Sample]]) -> None:
        """Fill `sample.baseline` and `.baselines`; `extra[p]` holds the samples of the further requests of prompt p."""

    def fill_values(self, samples: list[Sample]) -> None:
        """Fill `sample.values`, for a method with a critic."""

    def estimate(self, stream: Stream, place: int) -> Tensor:
        """The advantages [N, L] of the stream at this place of the weighting, detached, 0 outside the mask."""
        raise TypeError(f"{type(self).__name__} does not say how advantages are estimated")

    def further_loss(self, batch: dict[str, Tensor], normalizer: Tensor | None) -> None:
        """Train what is not the policy (a critic) on this micro-batch."""

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        self.check_arithmetic()
        self.engine_step, self.eval_writer, self.buffer = None, None, None  # they may be another run's
        output = super().train(*args, **kwargs)
        self.engine_step = None  # the best checkpoint may have been loaded
        return output

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """One optimiser step's micro-batches, from a rollout of the policy as it was at the rollout's first step."""
        if self.finished:  # as in TrainerMixin
            return [], None
        steps = self.args.steps_per_rollout
        position = self.state.global_step % steps
        if self.state.global_step == self.resume_step:
            self.check_reference()
            self.load_state(self.resume_state)
            if position:  # the prompts of the rest of this rollout are in the buffer
                list(islice(epoch_iterator, (steps - position) * num_batches))
        if position == 0:
            prompts, places = self.take_prompts(epoch_iterator, num_batches)
            if not prompts:
                return [], None
            self.buffer = self.fill_buffer(prompts, places, num_batches)
        samples = self.buffer.mini_batch(position)
        if self.weighting.update_per == "mini_batch":
            self.update_weighting(samples)
        count = self.loss_count(samples)
        return [self.collate(batch) for batch in self.cut(samples, num_batches)], count

    def take_prompts(self, epoch_iterator, num_batches: int) -> tuple[list[dict], list[int]]:
        """The prompts of a rollout on this process, and their places in its global batch."""
        args, prompts, places = self.args, [], []
        for number, batch in enumerate(islice(epoch_iterator, num_batches * args.steps_per_rollout)):
            if number >= num_batches * args.num_mini_batches:
                continue  # the block's repetitions, one for each further pass
            # accelerate deals whole batches to the processes in turn
            first = (number * args.world_size + args.process_index) * args.train_batch_size
            prompts += batch
            places += range(first, first + len(batch))
        return prompts, places

    def fill_buffer(self, prompts: list[dict], places: list[int], num_batches: int) -> RolloutBuffer:
        """From prompts to samples that know their advantages."""
        self.sync_engine()
        with self.phase("generate"):
            samples, extra = self.roll_out(prompts, places)
        with self.phase("score"):
            self.rewards.fill(samples + [sample for group in extra for sample in group])
            self.set_baselines(samples, extra)
        parts = self.cut(samples, max(1, -(-len(samples) // (self.args.train_batch_size * self.args.num_generations))))
        with self.phase("reference"):
            for part in parts:
                self.fill_reference(part)
        if self.args.steps_per_rollout > 1:
            with self.phase("old_logps"):
                for part in parts:
                    self.fill_old_logps(part)
        with self.phase("advantages"):
            self.fill_values(samples)
            self.fill_advantages(samples)
        self.learn_from_gradients(parts)
        self.record_rollouts(samples)
        if self.weighting.update_per == "rollout":
            self.update_weighting(samples)
        if self.kl_controller is not None:
            self.update_kl_coefficient(samples)
        size = -(-len(samples) // self.args.num_mini_batches)
        mini_batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        return RolloutBuffer(mini_batches, self.args.seed, self.state.global_step)

    def roll_out(self, prompts: list[dict], places: list[int]) -> tuple[list[Sample], list[list[Sample]]]:
        """One engine call for all requests of all prompts; returns the trained samples and, per prompt, the others.

        places: of the prompts in the global batch of this rollout.
        """
        requests = self.requests()
        rollouts = self.engine.generate(
            [prompt["prompt_ids"] for prompt in prompts for _ in requests],
            [
                replace(request, seed=derive_seed(self.args.seed, "train", self.state.global_step, place, number))
                for place in places
                for number, request in enumerate(requests)
            ],
        )
        samples, extra = [], []
        for i, prompt in enumerate(prompts):
            made = [
                make_samples(self.processing_class, prompt, rollout.completions, rollout.weight_version)
                for rollout in rollouts[i * len(requests) : (i + 1) * len(requests)]
            ]
            samples += made[0]
            extra.append([sample for group in made[1:] for sample in group])
        return samples, extra

    def fill_reference(self, samples: list[Sample]) -> None:
        """Reference log-probs of each sample's completion, at the sampling temperature."""
        batch = self._prepare_inputs(self.collate(samples))
        with self.reference.active() as model:
            logps = completion_logps(model, batch, temperature=self.args.temperature)
        self.give(samples, "ref_logps", logps)

    @torch.no_grad()
    def fill_old_logps(self, samples: list[Sample]) -> None:
        """Log-probs of the policy before the rollout's first update, which the ratio is taken against."""
        batch = self._prepare_inputs(self.collate(samples))
        self.give(samples, "old_logps", self.policy_logps(self.model, batch)[0])

    @staticmethod
    def give(samples: list[Sample], name: str, values: Tensor) -> None:
        """Each sample's row of values [B, L, ...]."""
        for sample, row in zip(samples, values.detach().cpu(), strict=True):
            setattr(sample, name, row[: sample.length].clone())

    def fill_advantages(self, samples: list[Sample]) -> None:
        """One advantage per token and stream."""
        mask, columns = completion_masks(samples), [self.weighting.scores(sample.rewards) for sample in samples]
        logps = completion_matrix(samples, "old_logps" if samples[0].old_logps is not None else "engine_logps")
        ref_logps = completion_matrix(samples, "ref_logps")
        values = completion_matrix(samples, "values") if samples[0].values is not None else None
        advantages = []
        for place, name in enumerate(self.weighting.streams):
            baselines = [sample.baselines[name] for sample in samples] if samples[0].baselines else None
            stream = Stream(
                scores=torch.tensor([column[name] for column in columns]),
                baselines=None if baselines is None else torch.tensor(baselines),
                beta=self.beta if self.args.kl_in == "reward" and (place == 0 or self.weighting.kl_everywhere) else 0.0,
                logps=logps,
                ref_logps=ref_logps,
                mask=mask,
                values=None if values is None else values[..., place],
            )
            estimated = self.estimate(stream, place)
            advantages.append(self.whitened(estimated, mask) if self.weighting.standardize else estimated)
        for sample, row in zip(samples, torch.stack(advantages, dim=-1), strict=True):
            sample.advantages = row[: sample.length]

    def policy_logps(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probs at the sampling temperature and entropies (nats) of the completions' tokens, [B, L] each, 0 outside
        them."""
        return completion_logps(model, batch, temperature=self.args.temperature, return_entropy=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, mask = self.args, inputs["completion_mask"]
        logps, entropy = self.policy_logps(model, inputs)
        old_logps = inputs.get("old_logps", logps.detach())
        if self.state.global_step % args.steps_per_rollout == 0:
            self.check_logps(logps.detach(), inputs)
        advantages = inputs["advantages"] @ torch.tensor(self.weighting.weights()).to(inputs["advantages"])
        policy = clipped_policy_loss(
            logps,
            old_logps,
            advantages,
            mask,
            clip_low=args.epsilon,
            clip_high=args.epsilon_high or args.epsilon,
            dual_clip=args.dual_clip,
            ratio_level=args.importance_sampling_level,
        )
        losses = policy.losses
        if args.rollout_correction != "none":
            level, outside = args.rollout_correction.split("_")
            bounds = {"high": args.rollout_correction_high, "low": args.rollout_correction_low}
            ratios = log_ratios(old_logps, inputs["engine_logps"], mask)
            losses = losses * importance_weights(ratios, mask, level=level, outside=outside, **bounds)
        if args.kl_in == "loss" and self.beta:
            price = self.beta * self.weighting.weights()[0]  # the KL is a part of the task
            losses = losses + price * getattr(kl, args.kl_estimator)(logps, inputs["ref_logps"])
        self.record_update(logps.detach(), entropy, policy, inputs)
        self.further_loss(inputs, num_items_in_batch)
        # The count is of all ranks, and DDP averages the gradients over them.
        loss = aggregate_tokens(losses, mask, args.loss_aggregation, num_items_in_batch)
        return loss * self.accelerator.num_processes

    # ---- over all processes -----------------------------------------------------------------------------------------

    def everywhere(self, values: Tensor) -> Tensor:
        """Rows of all processes, this one's at `own_rows(N)`. values: [N, ...], N the same everywhere."""
        if self.accelerator.num_processes == 1:
            return values
        if values.dim() > 1:
            values = self.accelerator.pad_across_processes(values, dim=1)
        return self.accelerator.gather(values.to(self.args.device)).cpu()

    def own_rows(self, count: int) -> slice:
        return slice(self.args.process_index * count, (self.args.process_index + 1) * count)

    def whitened(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean 0, deviation 1 over the tokens of all processes. values, mask: [N, L]."""
        everyone = whiten(self.everywhere(values), self.everywhere(mask))
        return everyone[self.own_rows(len(values)), : values.shape[1]]

    def update_kl_coefficient(self, samples: list[Sample]) -> None:
        logps = completion_matrix(samples, "old_logps" if samples[0].old_logps is not None else "engine_logps")
        gaps = kl.masked_sum(logps - completion_matrix(samples, "ref_logps"), completion_masks(samples))
        gaps = self.everywhere(gaps)
        self.kl_controller.update(gaps.mean().item(), len(gaps))

    @property
    def beta(self) -> float:
        """The KL coefficient now."""
        return self.args.beta if self.kl_controller is None else self.kl_controller.value

    @property
    def pad_token_id(self) -> int:
        tokenizer = self.processing_class
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
