"""Options of TRL's GRPO and RLOO trainers that have another name here, or no function."""

from dataclasses import dataclass, field, fields
from typing import Any

from align.config.other_names import END, STOPS
from align.errors import ConfigError
from align.rollout.make import rollout_options
from align.rollout.options import RolloutOptions
from align.trainers.core.moving_reference import MovingReferenceOptions
from align.trainers.core.options import FLAG
from align.trainers.core.trl_options import of_trl
from align.trainers.on_policy.loss_options import LossOptions
from align.trainers.on_policy.shown import ShownCompletionsOptions

DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# TRL's names of the options of rollout: {backend: vllm}
VLLM = {
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_tensor_parallel_size": "tensor_parallel",
    "vllm_enable_sleep_mode": "sleep",
}
SERVER = "rollout: {backend: server, urls: [...]} (docs/rollouts.md)"
CORRECTION = "rollout_correction, with rollout_correction_low and rollout_correction_high"
ENGINE = "rollout: {backend: vllm}, or transformers, whose batches are made here (docs/rollouts.md)"

INSTEAD = {
    **dict.fromkeys((*STOPS, "eos_token_id", "include_stop_str_in_output", "stopping_criteria"), END),
    **dict.fromkeys(("max_new_tokens", "max_tokens", "max_length"), "max_completion_length is the option"),
    **dict.fromkeys(("n", "num_return_sequences"), "num_generations is the option"),
    "seed": "every draw is seeded by the option seed, the step and the prompt: leave it out",
}
"""Of `generation_kwargs` what is no matter of probabilities."""


@dataclass
class TrlOnPolicyOptions(MovingReferenceOptions, ShownCompletionsOptions, LossOptions):
    """What another value asks for is refused with what to write instead; `num_generations_eval`, those of
    `sync_ref_model`, of `log_completions` and of the loss work."""

    # ---- another name here
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "TRL's name of truncated: mask, which also takes them out of the baselines."}
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": f"TRL's: another place for {', '.join(DRAWN)}; do_sample may be true. What else would change how "
            "completions are drawn is refused."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Variables of the chat template for all prompts; a row's own come first."}
    )
    max_tool_calling_iterations: int | None = field(
        default=None, metadata={"help": "TRL's: rounds of tool calls; max_turns is one more."}
    )
    num_generations_eval: int | None = field(default=None, metadata={"help": "TRL's name of eval_num_generations."})
    shuffle_dataset: bool = field(
        default=True,
        metadata={"help": "TRL's: false is train_sampling_strategy: sequential, the prompts as they come."},
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "TRL's: batches of per_device_train_batch_size prompts in a rollout of one process, "
            "gradient_accumulation_steps x num_mini_batches. Sets num_mini_batches."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "TRL's: completions in a rollout of all processes, num_generations for each prompt. Sets "
            "num_mini_batches."
        },
    )
    use_vllm: bool | None = field(
        default=None,
        metadata={
            "help": "TRL's: true is rollout: {backend: vllm}, false transformers. Default: what the section rollout "
            "says, which is vLLM where it is installed.",
            **FLAG,
        },
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "TRL's name of rollout.gpu_memory_utilization."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "TRL's name of rollout.tensor_parallel."})
    vllm_enable_sleep_mode: bool = field(default=False, metadata={"help": "TRL's name of rollout.sleep."})
    pad_to_multiple_of: int | None = of_trl(None, "leave it out; batching: shared_prefix pads nothing")
    cast_lm_head_to_fp32: bool = of_trl(False, "leave it out: log-probs are summed in float32 anyway")
    vllm_mode: str = of_trl("colocate", SERVER)
    vllm_model_impl: str = of_trl("vllm", "leave it out: vLLM runs its own implementations (docs/rollouts.md)")
    vllm_max_model_length: int | None = of_trl(None, "max_prompt_length and max_completion_length, whose sum it is")
    vllm_server_base_url: str | None = of_trl(None, SERVER)
    vllm_server_host: str = of_trl("0.0.0.0", SERVER)  # noqa: S104 (TRL's default; nothing listens)
    vllm_server_port: int = of_trl(8000, SERVER)
    vllm_server_timeout: float = of_trl(240.0, "rollout: {backend: server, on_engine_failure: wait, wait_limit: ...}")
    vllm_group_port: int = of_trl(51216, "leave it out: rollout.transfer: nccl and gloo find a free port")
    vllm_importance_sampling_correction: bool = of_trl(False, "rollout_correction: token_truncate or sequence_mask")
    vllm_importance_sampling_mode: str = of_trl("sequence_mask", CORRECTION)
    vllm_importance_sampling_clip_max: float | None = of_trl(3.0, CORRECTION)
    vllm_importance_sampling_clip_min: float | None = of_trl(None, CORRECTION)
    vllm_importance_sampling_cap: float | None = of_trl(None, CORRECTION)
    use_transformers_continuous_batching: bool = of_trl(False, ENGINE)
    transformers_continuous_batching_config: dict[str, Any] | str | None = of_trl(None, ENGINE)
    use_transformers_paged: bool = of_trl(False, ENGINE)
    cache_implementation: str | None = of_trl(None, ENGINE)
    ds3_gather_for_generation: bool = of_trl(True, "leave it out: weights are gathered one by one")
    normalize_advantages: bool = of_trl(False, "the method reinforce_pp, which whitens over the rollout")
    # ---- what does not exist here
    vllm_structured_outputs_regex: str | None = of_trl(
        None, "a reward of type format: the loss would not know the probabilities of constrained draws"
    )
    log_multimodal: bool = of_trl(True, "leave it out: images are refused")
    log_unique_prompts: bool = of_trl(False, "num_completions_to_print and log_completions")
    log_completions_hub_repo: str | None = of_trl(None, "log_completions, and a tracker (report_to)")
    reward_clip_range: Any = of_trl(None, "clip inside the reward function; ReMax has reward_clip")
    multi_objective_aggregation: str = of_trl("sum_then_normalize", "method grpo, dynamic_weights or constraints")


def take_engine(args: Any) -> None:
    """TRL's names for the engine, and `rollout_backend`, as the section `rollout`. Raises `ConfigError` beside one."""
    defaults = {f.name: f.default for f in fields(args) if f.name in ("rollout_backend", "use_vllm", *VLLM)}
    given = {name: value for name, default in defaults.items() if (value := getattr(args, name)) != default}
    if not given:
        return
    first, last = next(iter(given)), next(reversed(given))
    options = {VLLM[name]: value for name, value in given.items() if name in VLLM}
    if given == {"use_vllm": True} and rollout_options(args.rollout).backend in ("vllm", "server"):
        args.use_vllm = None  # a script of TRL's, with a section rollout in its file
        return
    if args.rollout != RolloutOptions():
        raise ConfigError(
            f"{first}: write it in the section rollout instead, as rollout.{VLLM.get(first, 'backend')}", key=first
        )
    if args.rollout_backend is not None and len(given) > 1:
        raise ConfigError(f"rollout_backend and {first}: write both in the section rollout instead", key=first)
    if args.use_vllm is False and options:
        raise ConfigError(f"{last} is vLLM's, and use_vllm is false: leave one of them out", key=last)
    backend = args.rollout_backend or ("transformers" if args.use_vllm is False else "vllm")
    args.rollout = {"backend": backend, **options}
    for name in given:
        setattr(args, name, defaults[name])


def take_rollouts(args: Any) -> None:
    """TRL's names for the completions of an evaluation, and for order and size of a rollout."""
    if args.num_generations_eval is not None:
        if args.eval_num_generations not in (1, args.num_generations_eval):
            raise ConfigError(
                "num_generations_eval is TRL's name of eval_num_generations: set one of them",
                key="num_generations_eval",
            )
        args.eval_num_generations = args.num_generations_eval
    _take_size(args)
    _take_order(args)


def _take_size(args: Any) -> None:
    """`steps_per_generation` or `generation_batch_size` as `num_mini_batches`. ConfigError for a rollout that is not
    made of whole optimiser steps, which TRL allows: it takes the rest of a rollout into the next step."""
    steps, size, accumulated = args.steps_per_generation, args.generation_batch_size, args.gradient_accumulation_steps
    if steps is None and size is None:
        return
    if steps is not None and size is not None:
        raise ConfigError("steps_per_generation and generation_batch_size say the same: leave one of them out")
    if steps is not None:
        name, given, step = "steps_per_generation", steps, accumulated
        what = f"batches, and an optimiser step has gradient_accumulation_steps = {step}"
    else:
        step = args.train_batch_size * args.num_generations * accumulated * args.world_size
        name, given = "generation_batch_size", size
        what = (
            f"completions, and an optimiser step has {step}: per_device_train_batch_size = {args.train_batch_size} "
            f"prompts (TRL counts completions there) x num_generations = {args.num_generations} x "
            f"gradient_accumulation_steps = {accumulated} x {args.world_size} processes"
        )
    if given % step:
        raise ConfigError(
            f"{name}: {given} {what}. A rollout is made of whole steps: write a multiple of {step}, or "
            "num_mini_batches (docs/on_policy.md)",
            key=name,
        )
    if args.num_mini_batches not in (1, given // step):
        raise ConfigError(
            f"{name}: {given} means num_mini_batches = {given // step}, and {args.num_mini_batches} is given: leave "
            "one of them out",
            key=name,
        )
    args.num_mini_batches = given // step


def _take_order(args: Any) -> None:
    """`shuffle_dataset: false` as `train_sampling_strategy`."""
    if not args.shuffle_dataset:
        args.train_sampling_strategy = "sequential"


def take_turns(args: Any) -> None:
    """`max_tool_calling_iterations` as `max_turns`: the answer after the last round of calls is a turn too."""
    rounds = args.max_tool_calling_iterations
    if rounds is None:
        return
    if not isinstance(rounds, int) or rounds < 0:
        raise ConfigError(f"max_tool_calling_iterations must be a whole number from 0, got {rounds!r}")
    if args.max_turns not in (None, rounds + 1):
        raise ConfigError(
            f"max_tool_calling_iterations: {rounds} means max_turns = {rounds + 1}, and {args.max_turns} is given: "
            "leave one of them out",
            key="max_tool_calling_iterations",
        )
    args.max_turns = rounds + 1


def take_generation_kwargs(args: Any) -> None:
    """`generation_kwargs` as the options that they name. ConfigError for what would draw from a distribution whose
    probabilities are not known, and for two values of one option."""
    given = dict(args.generation_kwargs or {})
    if given.pop("do_sample", True) is not True:
        raise ConfigError("generation_kwargs: do_sample: false gives every sample of a prompt the same completion")
    for name in given:
        if name in INSTEAD:
            raise ConfigError(f"generation_kwargs: {name}: {INSTEAD[name]}", key="generation_kwargs")
    other = sorted(given.keys() - set(DRAWN))
    if other:
        raise ConfigError(
            f"generation_kwargs: {', '.join(other)} would draw from a distribution whose probabilities the loss does "
            f"not know; there are {', '.join(DRAWN)}, which are options of their own. Options of vLLM: rollout: "
            "{backend: vllm, ...} (docs/rollouts.md)",
            key="generation_kwargs",
        )
    defaults = {f.name: f.default for f in fields(args)}
    for name, value in given.items():
        if getattr(args, name) not in (defaults[name], value):
            raise ConfigError(f"generation_kwargs and {name} itself are given: leave one of them out", key=name)
        setattr(args, name, value)
