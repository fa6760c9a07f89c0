"""The ranges of numeric options: transformers', TRL's and ours, in one table that files and Python go through.

A value that a later stage would refuse, or that would train nonsense, is refused when the configuration is made. NaN is
in no range. What depends on two options is checked where they meet.
"""

import math
from typing import Any, get_args

from align.config.arguments import hints, init_fields
from align.errors import ConfigError

_HUGE = 10**12  # steps, tokens, bytes: beyond it nobody means it

# (least, whether it is itself allowed, largest, whether it is), and the options
_TABLE = {
    (0, True, 1, True): "rollouts_ahead lam label_smoothing_factor min_p top_entropy_quantile",
    (0, False, 1, True): "gamma top_p selective_tokens vllm_gpu_memory_utilization",
    (0, True, 1, False): "old_policy_share adam_beta1 adam_beta2 max_bad_share label_noise lora_dropout",
    (0, False, 1, False): "improver_weight",
    (0, False, 10, True): "repetition_penalty",
    (0.01, True, 2, True): "temperature",  # what `align.rollout.types` takes
    (0, False, _HUGE, True): (
        "adam_epsilon epsilon epsilon_high dual_clip kl_target kl_horizon kl_gain rollout_correction_high "
        "num_train_epochs logging_steps save_steps eval_steps reward_clip value_clip "
        "environment_timeout missing_eos_penalty overlong_penalty desirable_weight undesirable_weight delta "
        "off_policy_mask_threshold score_margin implicit_reward_beta "
        "entropy_coef_delta sapo_temperature_pos sapo_temperature_neg vespo_lambda_pos vespo_lambda_neg"
    ),
    (0, True, _HUGE, True): (
        "learning_rate critic_learning_rate discriminator_learning_rate meta_learning_rate weight_decay max_grad_norm "
        "warmup_steps eval_delay neftune_noise_alpha "
        "rollout_correction_low beta router_aux_loss_coef center_rewards_coefficient score_l2_coefficient "
        "sweep_min_weight dataloader_num_workers num_logged_completions num_logged_pairs critic_warmup_steps "
        "max_tool_calling_iterations "
        "top_k dynamic_sampling_rounds entropy_coef entropy_coef_min entropy_coef_max entropy_target vespo_k_pos "
        "vespo_k_neg"
    ),
    (0, True, 2**32 - 1, True): "seed data_seed label_noise_seed mixture_seed half_finetuning",
    (1, True, _HUGE, True): (
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_r lora_alpha "
        "max_length max_prompt_length max_completion_length num_generations eval_num_generations num_generations_eval "
        "num_mini_batches steps_per_generation generation_batch_size num_completions_to_print max_turns "
        "partial_rollouts vllm_tensor_parallel_size "
        "num_iterations num_eval_prompts normalizer_pairs chunk_size tokens_per_batch forward_tokens_per_batch "
        "precompute_ref_batch_size overlong_buffer max_new_tokens "
        "save_total_limit eval_accumulation_steps dataset_num_proc dataloader_prefetch_factor ddp_bucket_cap_mb "
        "ddp_timeout torch_empty_cache_steps pad_to_multiple_of gold_labels gold_label_every gold_label_budget "
        "discriminator_epochs discriminator_batch_size discriminator_lora_r meta_every max_revision_length"
    ),
    (-1, True, _HUGE, True): "max_steps local_rank",
    # Their ranges depend on the loss, the variant or each other: they are checked where these are known.
    (-_HUGE, True, _HUGE, True): (
        "alphapo_alpha beta_dpo_alpha beta_dpo_filter beta_dpo_momentum cpo_alpha discopop_tau f_alpha_divergence_coef "
        "interpolate label_smoothing ld_alpha mask_dropout mask_l1_kl mask_l1_reward mask_learning_rate mask_mlp_size "
        "mask_weight_decay rpo_coef rpo_eta simpo_gamma sweep_points tdpo_alpha ensemble ensemble_member "
        "ensemble_upper_layers ref_model_mixup_alpha ref_model_sync_steps reward_weights loss_weights"
    ),
}
RANGES = {name: limits for limits, names in _TABLE.items() for name in names.split()}


def problem_with(name: str, value: Any) -> str | None:
    """What is wrong with the number, or the numbers, given for an option; None if nothing is."""
    if isinstance(value, list | tuple | dict):
        values = value.values() if isinstance(value, dict) else value
        numbers = [number for number in values if isinstance(number, int | float)]
        return next(filter(None, (problem_with(name, number) for number in numbers)), None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} must be a finite number, got {value}"
    if name not in RANGES:
        return None
    least, from_least, most, to_most = RANGES[name]
    low = f"at least {least}" if from_least else f"above {least}"
    if value < least or (value == least and not from_least):
        return f"{name} must be {low}, got {value:.6g}"
    if value > most or (value == most and not to_most):
        shown = "too large" if value > 1e300 else f"{value:.6g}"
        return f"{name} must be {low} and {'at most' if to_most else 'below'} {most:g}, got {shown}"
    return None


def check_ranges(options: Any) -> None:
    """Every numeric field of a configuration object. ConfigError naming the first that is out of its range, or no whole
    number where its type is one. Makes 4.0 (of 8 / 2) the whole number it is."""
    for name in RANGES:
        value: Any = getattr(options, name, None)
        kinds = _kinds(type(options), name)
        problem = problem_with(name, value)
        if not problem and isinstance(value, float) and int in kinds and float not in kinds:
            if value.is_integer():
                setattr(options, name, int(value))
            else:
                problem = f"{name} must be a whole number, got {value:.6g}"
        if problem:
            raise ConfigError(problem, key=name)


def _kinds(cls: type, name: str) -> set[Any]:
    """What the type of a field takes: {int, NoneType} of `int | None`. Empty for what is no field."""
    if name not in init_fields(cls):
        return set()
    return set(get_args(hints(cls)[name]) or (hints(cls)[name],))
