"""The one on-policy loop: prompts -> rollouts -> rewards -> baseline -> reference -> micro-batches -> update.

`OnPolicyTrainer` is transformers' Trainer whose batches are made by the policy itself: `get_batch_samples`, which
collects the micro-batches of one optimiser step, samples all of them in one engine call. Methods plug in three things:
`requests` (what to sample for a prompt, the baseline included), `set_baselines` and `token_weights` (the advantages).

Every draw is seeded by (seed, step, place of the prompt in the step's global batch), so a run does not depend on how
its batches are cut into processes and micro-batches, nor on where it was resumed.
"""

import logging
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Trainer, set_seed

from align.errors import ConfigError, TrainingError
from align.modeling.load import disable_dropout, load_policy, load_tokenizer, reference_of
from align.modeling.logprobs import token_logps
from align.objectives.advantages import remax_loss
from align.objectives.kl import k1, k3, masked_sum
from align.rollout.engine import RolloutEngine
from align.rollout.seeds import derive_seed
from align.rollout.types import SamplingParams
from trainers.base import BaseConfig, TrainerMixin
from trainers.policy_evaluation import Curve, PolicyEvaluation, eval_prompts
from trainers.reference_checks import ReferenceChecks
from trainers.rewards import RewardColumns
from trainers.rollouts import Sample, collate, make_samples, split, tokenized_prompts

logger = logging.getLogger(__name__)


@dataclass
class OnPolicyConfig(BaseConfig):
    """Options of every on-policy method. `per_device_train_batch_size` counts prompts."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    num_generations: int = field(default=1, metadata={"help": "Sampled completions per prompt and step."})
    max_prompt_length: int = field(default=512, metadata={"help": "Longer prompts are bad rows (tokens)."})
    max_completion_length: int = field(default=256, metadata={"help": "Completions are cut here (tokens)."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; log-probs are taken at it too."})
    beta: float = field(default=0.05, metadata={"help": "Coefficient of the KL to the reference, nats."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward; their weighted sum is maximised. Default: all 1."}
    )
    loss_aggregation: str = field(
        default="sequence_sum",
        metadata={
            "help": "sequence_sum: sum over tokens, mean over sequences (the policy gradient); token_mean: divide by "
            "the tokens of the global batch."
        },
    )
    rollout_backend: str = field(default="auto", metadata={"help": "auto, vllm or transformers."})
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": "Share of the GPU given to vLLM."})
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout makes the policy differ from its rollouts."})
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step: where curves start."})
    num_eval_prompts: int | None = field(default=256, metadata={"help": "Evaluate on the first so many; None: all."})
    eval_num_generations: int = field(default=1, metadata={"help": "Completions per prompt in an evaluation."})
    num_logged_completions: int = field(default=8, metadata={"help": "Completions shown per evaluation; 0: none."})

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be > 0 for sampling, got {self.temperature}")
        if self.loss_aggregation not in ("sequence_sum", "token_mean"):
            raise ConfigError(f"loss_aggregation must be sequence_sum or token_mean, got {self.loss_aggregation!r}")
        if self.num_generations < 1 or self.eval_num_generations < 1:
            raise ConfigError("num_generations and eval_num_generations must be at least 1")


class OnPolicyTrainer(PolicyEvaluation, ReferenceChecks, TrainerMixin, Trainer):
    """The loop. Subclasses implement `token_weights`, and `requests` and `set_baselines` where they need more.

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
        model = load_policy(model, peft_config=peft_config)
        if args.disable_dropout:
            disable_dropout(model)
        self.rewards = RewardColumns(reward, args.reward_weights, tokenizer=processing_class)
        self.gold = RewardColumns(gold_reward, None, tokenizer=processing_class) if gold_reward is not None else None
        self.check_start = ref_model is None
        self.reference = reference_of(model, ref_model)
        self.engine = engine
        self.owns_engine = engine is None
        self.engine_step: int | None = None  # whose weights the engine has, as far as this trainer knows
        self.eval_writer = None
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
        self.reference.prepare(self.accelerator)
        # Before the trackers' own callbacks: TensorBoard closes its writer there.
        self.callback_handler.callbacks.insert(0, Curve(self))

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
        """Fill `sample.baseline`; `extra[p]` holds the samples of the further requests of prompt p."""

    def token_weights(self, logps: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The detached weight of every token's log-prob, [B, T-1]; logps: [B, T-1], detached."""
        raise TypeError(f"{type(self).__name__} does not say how tokens are weighted")

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        self.check_arithmetic()
        self.engine_step, self.eval_writer = None, None  # the weights and the curve may be another run's
        output = super().train(*args, **kwargs)
        self.engine_step = None  # the best checkpoint may have been loaded
        return output

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """One optimiser step's micro-batches, sampled by the policy as it is now."""
        if self.finished:  # as in TrainerMixin
            return [], None
        prompts, places = [], []
        for number, batch in enumerate(islice(epoch_iterator, num_batches)):
            # accelerate deals whole batches to the processes in turn
            first = (number * self.args.world_size + self.args.process_index) * self.args.train_batch_size
            prompts += batch
            places += range(first, first + len(batch))
        if not prompts:
            return [], None
        if self.state.global_step == self.resume_step:
            self.check_reference()
        self.sync_engine()
        with self.phase("generate"):
            samples, extra = self.roll_out(prompts, places)
        with self.phase("score"):
            self.rewards.fill(samples + [sample for group in extra for sample in group])
            self.set_baselines(samples, extra)
        batches = split(samples, num_batches)
        with self.phase("reference"):
            for batch in batches:
                self.fill_reference(batch)
        self.record_rollouts(samples)
        tokens = sum(sample.length for sample in samples)
        count = tokens if self.args.loss_aggregation == "token_mean" else len(samples)
        count = self.accelerator.gather(torch.tensor([count], device=device)).sum()
        return [collate(batch, self.pad_token_id) for batch in batches], count

    def roll_out(self, prompts: list[dict], places: list[int]) -> tuple[list[Sample], list[list[Sample]]]:
        """One engine call for all requests of all prompts; returns the trained samples and, per prompt, the others.

        places: of the prompts in the global batch of this step.
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
        batch = self._prepare_inputs(collate(samples, self.pad_token_id))
        ref_logps = self.reference.logps(
            batch["input_ids"],
            batch["attention_mask"],
            self.args.temperature,
            mask=pad(batch["completion_mask"], (1, 0)),
        ).cpu()
        for i, sample in enumerate(samples):
            end = len(sample.prompt["prompt_ids"]) + sample.length - 1
            sample.ref_logps = ref_logps[i, end - sample.length : end]

    def policy_logps(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs at the sampling temperature and entropies (nats) of the completions' tokens, [B, T-1] each, 0
        outside them."""
        return token_logps(
            model,
            batch["input_ids"],
            batch["attention_mask"],
            temperature=self.args.temperature,
            mask=pad(batch["completion_mask"], (1, 0)),
            return_entropy=True,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logps, entropy = self.policy_logps(model, inputs)
        self.check_logps(logps.detach(), inputs)
        self.record_logps(logps.detach(), entropy, inputs)
        weights = self.token_weights(logps.detach(), inputs)
        # The count is of all ranks, and DDP averages the gradients over them.
        loss = remax_loss(logps, weights, inputs["completion_mask"], normalizer=num_items_in_batch)
        return loss * self.accelerator.num_processes

    # ---- engine and state -------------------------------------------------------------------------------------------

    @property
    def pad_token_id(self) -> int:
        tokenizer = self.processing_class
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def sync_engine(self) -> None:
        """Make the engine, if there is none yet, and give it the weights of this step."""
        step = self.state.global_step
        if self.engine is not None and self.engine_step == step:
            return
        model = self.accelerator.unwrap_model(self.model)
        with self.phase("sync"):
            if self.engine is None:
                from align.rollout import make_engine

                self.engine = make_engine(
                    model,
                    self.processing_class,
                    backend=self.args.rollout_backend,
                    max_model_len=self.args.max_prompt_length + self.args.max_completion_length,
                    seed=self.args.seed,
                    gpu_memory_utilization=self.args.vllm_gpu_memory_utilization,
                )
                self.engine.weight_version = step
            else:
                report = self.engine.push(model, step)
                self.record("rollout/probe_max_abs_diff", report.probe_max_abs_diff)
        self.engine_step = step

    def close(self) -> None:
        """Free the rollout engine that the trainer made. It can go on: it makes a new one when it needs it."""
        if self.engine is not None and self.owns_engine:
            self.engine.close()
            self.engine = self.engine_step = None

    def check_arithmetic(self) -> None:
        """Say what a step is made of; raises `ConfigError` when there are fewer prompts than one step takes."""
        args = self.args
        prompts = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if len(self.train_dataset) < prompts:
            raise ConfigError(
                f"{len(self.train_dataset)} prompts are fewer than the {prompts} of one step "
                f"(per_device_train_batch_size {args.train_batch_size} x gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps} x {args.world_size} processes): lower one of them"
            )
        if self.is_world_process_zero():
            logger.info(
                "each step: %d prompts x %d samples -> %d sequences -> 1 optimiser step",
                prompts,
                args.num_generations,
                prompts * args.num_generations,
            )

    # ---- guards -----------------------------------------------------------------------------------------------------

    def check_logps(self, logps: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        """The policy that is trained must be the one that sampled, and at step 0 also the reference."""
        mask, tolerance = batch["completion_mask"], self.logp_tolerance
        gap = ((logps - batch["engine_logps"]) * mask).abs().sum() / mask.sum()
        self.record("rollout/mean_abs_logp_diff", gap, mask.sum())
        if not gap <= tolerance:
            raise TrainingError(
                f"step {self.state.global_step + 1}: the log-probs of the rollouts differ by {gap:.4f} nats per token "
                f"between the {self.engine.name} engine and the trainer (allowed {tolerance}). Does something change "
                "the weights or the logits outside the trainer? Compare with rollout_backend: transformers"
            )
        if self.state.global_step == 0 and self.check_start:
            self.check_same_start(logps, batch["ref_logps"], mask)

    def extra_state(self) -> dict:
        return {"reference": self.reference_probe()}

    # ---- metrics ----------------------------------------------------------------------------------------------------

    def record_rollouts(self, samples: list[Sample]) -> None:
        for sample in samples:
            for name, value in {**sample.rewards, **sample.extras}.items():
                self.record(f"rewards/{name}", value)
            self.record("reward", sample.score)
            self.record("completions/mean_length", sample.length)
            self.record("completions/clipped_ratio", sample.truncated)

    def record_logps(self, logps: torch.Tensor, entropy: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        mask = batch["completion_mask"]
        for name, estimator in (("kl", k1), ("kl_k3", k3)):
            self.record(name, masked_sum(estimator(logps, batch["ref_logps"]), mask, dim=-1).mean(), len(mask))
        for name, values in (("entropy", entropy), ("logps/mean", logps)):
            self.record(name, (values * mask).sum() / mask.sum(), mask.sum())
