"""Options by the names of other libraries (docs/coming_from_verl.md), as they were called once, or as they would be
called without their section, for the error about an unknown key."""

OTHER_NAMES = {
    "rollout_dtype": "rollout.dtype",
    "max_num_seqs": "rollout.max_num_seqs",
    "sync_tolerance": "rollout.sync_tolerance",
    "vllm_kv_cache_gib": "rollout.kv_cache_gib",
    "tokenizer": "processing_class",  # of TRL's trainers, once
    # TRL's PPO, of before 1.16
    "kl_coef": "beta",
    "num_ppo_epochs": "num_iterations",
    "cliprange": "epsilon",
    "cliprange_value": "value_clip",
    "response_length": "max_completion_length",
    "sft_model_path": "model_name_or_path",
    "reward_model_path": "rewards",
    "exp_name": "run_name",
    # of its other trainers, once
    "max_seq_length": "max_length",
    "rloo_k": "num_generations",
    "vllm_dtype": "rollout.dtype",
    "ppo_epochs": "num_iterations",
    "horizon": "kl_horizon",
    "target": "kl_target",
    # OpenRLHF's, of before 0.11
    "pretrain": "model_name_or_path",
    "critic_pretrain": "critic_model_name_or_path",
    "reward_pretrain": "rewards",
    "remote_rm_url": "rewards",
    "prompt_data": "dataset_name",
    "prompt_max_len": "max_prompt_length",
    "generate_max_len": "max_completion_length",
    "n_samples_per_prompt": "num_generations",
    "max_epochs": "num_iterations",
    "actor_learning_rate": "learning_rate",
    "max_norm": "max_grad_norm",
    "init_kl_coef": "beta",
    "eps_clip": "epsilon",
    "lambd": "lam",
    "entropy_loss_coef": "entropy_coef",
    "dynamic_filtering": "dynamic_sampling_rounds",
    "overlong_buffer_len": "overlong_buffer",
    "overlong_penalty_factor": "overlong_penalty",
    "lora_rank": "lora_r",
    "target_modules": "lora_target_modules",
    "save_path": "output_dir",
    "max_ckpt_num": "save_total_limit",
    "load_checkpoint": "resume_from_checkpoint",
    # verl's, without their sections
    "train_files": "dataset_name",
    "val_files": "eval_dataset_name",
    "max_response_length": "max_completion_length",
    "clip_ratio": "epsilon",
    "clip_ratio_low": "epsilon",
    "clip_ratio_high": "epsilon_high",
    "clip_ratio_c": "dual_clip",
    "kl_loss_coef": "beta",
    "kl_loss_type": "kl_estimator",
    "rollout_is_threshold": "rollout_correction_high",
    "filter_overlong_prompts": "max_bad_share",
    "val_before_train": "eval_on_start",
    "loss_agg_mode": "loss_aggregation",
    "entropy_coeff": "entropy_coef",
    "grad_clip": "max_grad_norm",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "tensor_model_parallel_size": "rollout.tensor_parallel",
    "total_epochs": "num_train_epochs",
    "num_episodes": "num_train_epochs",
    # LLaMA-Factory's and axolotl's
    "dataset": "dataset_name",
    "base_model": "model_name_or_path",
    "ref_model": "ref_model_name_or_path",
    "reward_model": "rewards",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "additional_target": "lora_modules_to_save",
    "pref_beta": "beta",
    "dpo_beta": "beta",
    "pref_loss": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "ppo_target": "kl_target",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "preprocessing_num_workers": "dataset_num_proc",
    "dataset_processes": "dataset_num_proc",
    "flash_attn": "attn_implementation",
    "flash_attention": "attn_implementation",
    "template": "chat_template_path",
    "chat_template": "chat_template_path",
    # transformers', once
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
    "use_flash_attention_2": "attn_implementation",
    # what one would call them
    "model": "model_name_or_path",
    "model_id": "model_name_or_path",
    "train_dataset": "dataset_name",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
}

LENGTH = "max_length counts prompt and completion together: prompts are never cut, completions lose their end"
LOSS_MASK = "leave it out: what is trained follows from the format of the rows (docs/data.md)"
ADAPTER_OFF = "leave it out: with LoRA the reference is the policy with its adapter off; ref_model is another one"
ADAPTERS = "leave it out: model_name_or_path takes the folder of an adapter too"
FULL_OR_LORA = "use_peft: true trains an adapter; without it all weights are trained"
METHOD = "the method is the command (align dpo), or the key method of a file"
ROWS = 'a part of the rows: dataset_train_split: "train[:-500]", dataset_test_split: "train[-500:]"'
END = (
    "leave it out: a completion ends with an end token (the tokenizer's, or one of the model's generation config, "
    "whose eos_token_id may be a list) or is cut at max_completion_length. One that a string ended would have no end "
    "token to learn: let the reward judge the text before the string"
)
STOPS = ("stop", "stop_strings", "stop_sequences", "stop_words", "stop_token_ids")
"""What engines call the strings and tokens that end a completion."""
EVALUATIONS = "every evaluation shows num_logged_completions; outside of on-policy methods max_new_tokens turns it on"

REMOVED = {
    "max_prompt_length": LENGTH,
    "max_completion_length": LENGTH,
    "max_target_length": LENGTH,
    "max_new_tokens": "max_completion_length, of the on-policy methods",
    "truncation_mode": "leave it out: prompts are never cut, completions lose their end",
    "label_pad_token_id": "leave it out: padding is masked, whatever its token",
    "padding_value": "leave it out: padding is masked, whatever its token",
    "is_encoder_decoder": "leave it out: only decoders are trained here",
    "dataset_kwargs": LOSS_MASK,
    "dataset_batch_size": "leave it out: dataset_num_proc says how many processes tokenise",
    "num_of_sequences": "leave it out: packing fills rows of max_length tokens",
    "chars_per_token": "leave it out: packing fills rows of max_length tokens",
    "use_dft_loss": "loss_type: dft (SFT)",
    "generate_during_eval": EVALUATIONS,
    "num_sample_generations": EVALUATIONS,
    "rpo_alpha": "loss_type: [sigmoid, sft] with loss_weights: [1.0, ...], in which the second is rpo_alpha",
    "reference_free": "loss_type names losses without a reference (docs/losses.md)",
    "model_adapter_name": ADAPTER_OFF,
    "ref_adapter_name": ADAPTER_OFF,
    "force_use_ref_model": "leave it out: ref_model is used where it is given, with LoRA too",
    "ref_model_init_kwargs": "load the reference, and pass it as ref_model; ref_dtype is an option",
    "base_model_attribute_name": "leave it out: the model under the head is found without its name",
    "use_logits_to_keep": "leave it out: only the logits that the loss needs are computed",
    "use_num_logits_to_keep": "leave it out: only the logits that the loss needs are computed",
    "tools": "the rows may have a column tools (docs/data.md)",
    "total_episodes": "max_steps or num_train_epochs; a step has train_batch_size prompts x num_generations",
    "local_rollout_forward_batch_size": "forward_tokens_per_batch, which counts tokens",
    "batch_size": "per_device_train_batch_size and gradient_accumulation_steps",
    "mini_batch_size": "num_mini_batches, their number",
    "stop_token": END,
    "stop_token_id": END,
    "whiten_rewards": "whiten_advantages (PPO), or the method reinforce_pp, which whitens advantages",
    "normalize_reward": "normalize_advantages (RLOO), or the method reinforce_pp; what a reward model's scores are on "
    "its training data is saved with it, and normalize of its spec takes it off (docs/rewards.md)",
    "token_level_kl": "kl_in: reward has the KL on every token of the reward, kl_in: loss in the loss",
    "vf_coef": "leave it out: the critic is a model of its own, with critic_learning_rate",
    "adap_kl_ctrl": "kl_target turns it on",
    "vllm_device": "leave it out: an engine in the process shares its GPU; rollout: {backend: server} has its own",
    "vllm_enable_prefix_caching": "leave it out",
    "vllm_guided_decoding_regex": "a reward of type format: the loss would not know the probabilities of such draws",
}
"""Options that TRL once had, or has for other methods, and that have no single name here -> what to do instead."""

STEP_ROWS = "an optimiser step has per_device_train_batch_size x gradient_accumulation_steps x processes rows"
OF_STEPS = "in optimiser steps: num_mini_batches x num_iterations of them are one step of verl"
ELSEWHERE = {
    # verl's, and OpenRLHF's of before 0.11
    **dict.fromkeys(("adv_estimator", "advantage_estimator"), METHOD),
    "use_kl_loss": "kl_in: loss, and beta, its coefficient; beta: 0 is without a KL",
    "use_kl_in_reward": "kl_in: reward, and beta, its coefficient; beta: 0 is without a KL",
    "target_kl": "kl_target, in nats per completion: verl's is per token, so multiply it by the mean length",
    "norm_adv_by_std_in_grpo": "scale_rewards: none (GRPO) for false",
    "filter_groups": "dynamic_sampling_rounds, how often prompts without a signal are replaced at most",
    "rollout_is": "rollout_correction: token_truncate or sequence_truncate",
    "ppo_mini_batch_size": STEP_ROWS,
    "train_batch_size": f"{STEP_ROWS}; a rollout has num_mini_batches times as many",
    "rollout_batch_size": f"{STEP_ROWS}; a rollout has num_mini_batches times as many",
    "ppo_micro_batch_size_per_gpu": "per_device_train_batch_size (prompts with all their answers), or tokens_per_batch",
    "total_training_steps": f"max_steps, {OF_STEPS}",
    "save_freq": f"save_steps, {OF_STEPS}",
    "test_freq": f"eval_steps with eval_strategy: steps, {OF_STEPS}",
    "critic_warmup": f"critic_warmup_steps (PPO), {OF_STEPS}",
    **dict.fromkeys(STOPS, END),
    "adapter_name_or_path": ADAPTERS,
    "lora_model_dir": ADAPTERS,
    "ref_model_adapters": "leave it out: ref_model_name_or_path takes the folder of an adapter too",
    "reward_model_adapters": "leave it out: the path of a reward may be the folder of an adapter",
    "adapter": FULL_OR_LORA,
    "finetuning_type": FULL_OR_LORA,
    "stage": METHOD,
    "rl": METHOD,
    "val_size": ROWS,
    "val_set_size": ROWS,
    "test_split_size": ROWS,
    "max_samples": ROWS,
    "train_on_prompt": LOSS_MASK,
    "train_on_inputs": LOSS_MASK,
    "mask_history": LOSS_MASK,
    "lora_target_linear": "lora_target_modules: all-linear",
    "quantization_bit": "load_in_4bit",
    "pref_ftx": "loss_type: [sigmoid, sft] with loss_weights: [1.0, ...], in which the second is pref_ftx",
    "plot_loss": "leave it out: `align report RUN` makes a page of curves",
    "saves_per_epoch": "save_steps, below 1 a share of all steps",
    "evals_per_epoch": "eval_steps, below 1 a share of all steps",
    "warmup_ratio": "warmup_steps, below 1 a share of all steps",
    "group_by_length": "tokens_per_batch fills micro-batches by tokens; train_sampling_strategy: group_by_length (SFT)",
    "logging_dir": "leave it out: TENSORBOARD_LOGGING_DIR of the environment says where tensorboard's files go",
    "save_safetensors": "leave it out: weights are saved as safetensors",
    "tokenizer_name": "leave it out: the model's folder has its tokenizer",
    "num_gpus": "align launch CONFIG --num-processes N",
}
"""The same of LLaMA-Factory's and axolotl's options, and of those that transformers once had."""

OF_ROLLOUTS = "in optimiser steps: num_mini_batches x num_iterations of them are one rollout"
DATASETS = "datasets: [{path: ..., weight: ...}, ...] (docs/data.md)"
CUT_SCORE = (
    "missing_eos_penalty, which is subtracted from the score of a completion without an end, not put in its place"
)
ELSEWHERE |= {
    # of published recipes: alignment-handbook's, SimPO's, Tulu 3's (open-instruct), Safe-RLHF's, OpenRLHF's
    **dict.fromkeys(("dataset_mixer", "dataset_mixture", "dataset_mixer_list"), DATASETS),
    "dataset_splits": "dataset_train_split and dataset_test_split, or split of each of datasets",
    "gamma_beta_ratio": "simpo_gamma, which is the margin itself: gamma_beta_ratio x beta",
    "reduce_loss": "leave it out: the loss is the mean over all tokens of an optimiser step, however it is cut",
    **dict.fromkeys(("penalty_reward_value", "non_stop_penalty"), CUT_SCORE),
    **dict.fromkeys(("freezing_actor_steps", "freezing_steps"), f"critic_warmup_steps (PPO), {OF_ROLLOUTS}"),
    "micro_train_batch_size": "per_device_train_batch_size (on-policy: prompts with all their answers), or "
    "tokens_per_batch",
    "adam_betas": "adam_beta1 and adam_beta2",
    "lr_warmup_ratio": "warmup_steps, below 1 a share of all steps",
    "lr_warmup_steps": f"warmup_steps, {OF_STEPS}",
    **dict.fromkeys(
        ("lambda_init", "lambda_lr", "lambda_max", "lambda_update_delay_steps", "episode_cost_window_size"),
        "constraints, with multipliers: {form: softplus, ...} (docs/constrained.md, Coming from Safe-RLHF)",
    ),
}
