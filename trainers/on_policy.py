"""The one on-policy loop: prompts -> rollouts -> rewards -> baseline -> reference -> micro-batches -> update.

`OnPolicyTrainer` is transformers' Trainer whose batches are made by the policy itself: `get_batch_samples`, which
collects the micro-batches of one optimiser step, samples all of them in one engine call. Methods plug in two things:
`requests` (what to sample for a prompt, the baseline included) and `token_weights` (the advantages).
"""

import logging
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from align.data.tokenize import tokenize_prompts
from align.errors import ConfigError, TrainingError
from align.modeling.load import disable_dropout, load_policy, load_tokenizer, reference_of
from align.modeling.logprobs import token_logps
from align.objectives.advantages import remax_loss
from align.objectives.kl import k1, k3, masked_sum
from align.rollout.engine import RolloutEngine
from align.rollout.types import SamplingParams
from trainers.base import BaseConfig, TrainerMixin
from trainers.policy_evaluation import PolicyEvaluation
from trainers.rewards import RewardColumns
from trainers.rollouts import Sample, collate, make_samples, split

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


class OnPolicyTrainer(PolicyEvaluation, TrainerMixin, Trainer):
    """The loop. Subclasses implement `requests` and `token_weights`.

    Args:
        model: a model, a folder or a hub name. reward: a `Reward`, a spec (see docs/rewards.md) or a list of them.
        gold_reward: scored in evaluations only, never trained on. ref_model: defaults to the policy as it starts (with
        LoRA: the adapter switched off). engine: a `RolloutEngine`; by default one is made from the policy.
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
        model = load_policy(model, peft_config=peft_config)
        if args.disable_dropout:
            disable_dropout(model)
        self.rewards = RewardColumns(reward, args.reward_weights, tokenizer=processing_class)
        self.gold = RewardColumns(gold_reward, None, tokenizer=processing_class) if gold_reward is not None else None
        self.check_start = ref_model is None
        self.reference = reference_of(model, ref_model)
        self.engine = engine
        self.eval_writer = None
        tokenize = {
            "tokenizer": processing_class,
            "max_prompt_length": args.max_prompt_length,
            "max_bad_share": args.max_bad_share,
        }
        train_dataset = tokenize_prompts(train_dataset, **tokenize)
        if eval_dataset is not None:
            eval_dataset = tokenize_prompts(eval_dataset, **tokenize)
            if args.num_eval_prompts is not None:
                eval_dataset = eval_dataset.select(range(min(args.num_eval_prompts, len(eval_dataset))))
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # the losses are normalised by the global count, not by Trainer
        self.reference.prepare(self.accelerator)

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
        self.print_arithmetic()
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """One optimiser step's micro-batches, sampled by the policy as it is now."""
        prompts = [prompt for batch in islice(epoch_iterator, num_batches) for prompt in batch]
        if not prompts:
            return [], None
        self.sync_engine()
        with self.phase("generate"):
            samples, extra = self.roll_out(prompts)
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

    def roll_out(self, prompts: list[dict]) -> tuple[list[Sample], list[list[Sample]]]:
        """One engine call for all requests of all prompts; returns the trained samples and, per prompt, the others."""
        requests = self.requests()
        rollouts = self.engine.generate(
            [prompt["prompt_ids"] for prompt in prompts for _ in requests], [*requests] * len(prompts)
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
        ref_logps = self.reference.logps(batch["input_ids"], batch["attention_mask"], self.args.temperature).cpu()
        for i, sample in enumerate(samples):
            end = len(sample.prompt["prompt_ids"]) + sample.length - 1
            sample.ref_logps = ref_logps[i, end - sample.length : end]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logps = token_logps(
            model, inputs["input_ids"], inputs["attention_mask"], temperature=self.args.temperature
        )
        mask = inputs["completion_mask"]
        self.record_logps(logps.detach(), inputs)
        weights = self.token_weights(logps.detach(), inputs)
        # The count is of all ranks, and DDP averages the gradients over them.
        return remax_loss(logps, weights, mask, normalizer=num_items_in_batch) * self.accelerator.num_processes

    # ---- engine and state -------------------------------------------------------------------------------------------

    @property
    def pad_token_id(self) -> int:
        tokenizer = self.processing_class
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def sync_engine(self) -> None:
        """Make the engine, if there is none yet, and give it the weights of this step."""
        step = self.state.global_step
        with self.phase("sync"):
            if self.engine is None:
                from align.rollout import make_engine

                self.engine = make_engine(
                    self.accelerator.unwrap_model(self.model),
                    self.processing_class,
                    backend=self.args.rollout_backend,
                    max_model_len=self.args.max_prompt_length + self.args.max_completion_length,
                    seed=self.args.seed + 1000 * self.args.process_index,
                    gpu_memory_utilization=self.args.vllm_gpu_memory_utilization,
                )
                if self.resume_state:
                    self.engine.load_state_dict(self.resume_state["engine"])
                self.engine.weight_version = step
            elif self.engine.weight_version != step:
                report = self.engine.push(self.accelerator.unwrap_model(self.model), step)
                self.record("rollout/probe_max_abs_diff", report.probe_max_abs_diff)

    def extra_state(self) -> dict:
        return {"engine": self.engine.state_dict()}

    def close(self) -> None:
        """Free the rollout engine. The trainer can go on: it makes a new one when it needs it."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def print_arithmetic(self) -> None:
        args = self.args
        prompts = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if len(self.train_dataset) < prompts:
            raise ConfigError(
                f"{len(self.train_dataset)} prompts are fewer than the {prompts} of one step (per_device_train_batch_size "
                f"{args.train_batch_size} x gradient_accumulation_steps {args.gradient_accumulation_steps} x "
                f"{args.world_size} processes): lower one of them"
            )
        logger.info(
            "each step: %d prompts x %d samples -> %d sequences -> 1 optimiser step",
            prompts,
            args.num_generations,
            prompts * args.num_generations,
        )

    # ---- metrics ----------------------------------------------------------------------------------------------------

    def record_rollouts(self, samples: list[Sample]) -> None:
        for sample in samples:
            for name, value in {**sample.rewards, **sample.extras}.items():
                self.record(f"rewards/{name}", value)
            self.record("reward", sample.score)
            self.record("completions/mean_length", sample.length)
            self.record("completions/clipped_ratio", sample.truncated)

    def record_logps(self, logps: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        mask = batch["completion_mask"]
        rows = len(mask)
        kl = masked_sum(k1(logps, batch["ref_logps"]), mask, dim=-1)
        self.record("kl", kl.mean(), rows)
        self.record("kl_k3", masked_sum(k3(logps, batch["ref_logps"]), mask, dim=-1).mean(), rows)
        self.record("logps/mean", (logps * mask).sum() / mask.sum(), mask.sum())
        gap = ((logps - batch["engine_logps"]) * mask).abs()
        self.record("rollout/mean_abs_logp_diff", gap.sum() / mask.sum(), mask.sum())
        if self.state.global_step == 0 and self.check_start:
            worst = ((logps - batch["ref_logps"]) * mask).abs().max().item()
            tolerance = 1e-3 if logps.dtype == torch.float32 and not self.args.bf16 and not self.args.fp16 else 0.3
            if worst > tolerance:
                raise TrainingError(
                    f"before the first step the policy and its reference differ by {worst:.4f} nats on one token "
                    f"(tolerance {tolerance}): the reference is not the model that training starts from. Pass ref_model, "
                    "or merge the adapter that the policy starts with."
                )
