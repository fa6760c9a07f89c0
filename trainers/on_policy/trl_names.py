"""Options of TRL's GRPO and RLOO trainers that have another name here, or no function."""

from dataclasses import dataclass, field
from typing import Any

from align.trainers.core.moving_reference import MovingReferenceOptions
from align.trainers.core.trl_options import TrlDefaults, of_trl
from align.trainers.on_policy.shown import ShownCompletionsOptions

VLLM = "the section rollout, as rollout: {backend: vllm} (docs/rollouts.md)"
ENTROPY = "leave it out: there is no entropy bonus"


@dataclass
class TrlOnPolicyOptions(MovingReferenceOptions, ShownCompletionsOptions, TrlDefaults):
    """What another value asks for is refused with what to write instead; `num_generations_eval`, those of
    `sync_ref_model` and those of `log_completions` work."""

    # ---- another name here
    mask_truncated_completions: bool = of_trl(False, "truncated: mask (docs/on_policy.md)")
    num_generations_eval: int | None = field(default=None, metadata={"help": "TRL's name of eval_num_generations."})
    shuffle_dataset: bool = of_trl(True, "train_sampling_strategy: sequential")
    pad_to_multiple_of: int | None = of_trl(None, "leave it out; batching: shared_prefix pads nothing")
    generation_batch_size: int | None = of_trl(None, "num_mini_batches, optimiser steps per pass over a rollout")
    steps_per_generation: int | None = of_trl(None, "num_mini_batches, optimiser steps per pass over a rollout")
    delta: float | None = of_trl(None, "dual_clip, which caps the loss of bad actions")
    use_vllm: bool = of_trl(False, VLLM)
    vllm_mode: str = of_trl("colocate", VLLM)
    vllm_gpu_memory_utilization: float | None = of_trl(None, "rollout: {backend: vllm, gpu_memory_utilization: ...}")
    vllm_server_base_url: str | None = of_trl(None, "rollout: {backend: server, urls: [...]} (docs/serving.md)")
    vllm_importance_sampling_correction: bool = of_trl(False, "rollout_correction: token_truncate or sequence_mask")
    normalize_advantages: bool = of_trl(False, "the method reinforce_pp, which whitens over the rollout")
    # ---- what does not exist here
    generation_kwargs: dict[str, Any] | None = of_trl(None, "temperature, top_p, top_k, min_p and repetition_penalty")
    chat_template_kwargs: dict[str, Any] | None = of_trl(None, "a chat template on the tokenizer with them set")
    reward_clip_range: Any = of_trl(None, "clip inside the reward function; ReMax has reward_clip")
    off_policy_mask_threshold: float | None = of_trl(None, "rollout_correction: sequence_mask")
    multi_objective_aggregation: str = of_trl("sum_then_normalize", "dynamic_weights or constraints")
    top_entropy_quantile: float = of_trl(1.0, "leave it out: all tokens are trained")
    use_bias_correction_kl: bool = of_trl(False, "kl_estimator: k2, whose gradient is the reverse KL's")
    entropy_coef: float = of_trl(0.0, ENTROPY)
    use_adaptive_entropy: bool = of_trl(False, ENTROPY)
