"""Options of TRL's GRPO and RLOO trainers that have another name here, or no function."""

from dataclasses import dataclass, field, fields
from typing import Any

from align.errors import ConfigError
from align.trainers.core.moving_reference import MovingReferenceOptions
from align.trainers.core.trl_options import of_trl
from align.trainers.on_policy.loss_options import LossOptions
from align.trainers.on_policy.shown import ShownCompletionsOptions

DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
VLLM = "the section rollout, as rollout: {backend: vllm} (docs/rollouts.md)"


@dataclass
class TrlOnPolicyOptions(MovingReferenceOptions, ShownCompletionsOptions, LossOptions):
    """What another value asks for is refused with what to write instead; `num_generations_eval`, those of
    `sync_ref_model`, of `log_completions` and of the loss work."""

    # ---- another name here
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "TRL's name of truncated: mask, which also takes them out of the baselines."}
    )
    generation_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": f"TRL's: another place for {', '.join(DRAWN)}; do_sample may be true. What else would change how "
            "completions are drawn is refused."
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Variables of the chat template for all prompts; a row's own come first."}
    )
    num_generations_eval: int | None = field(default=None, metadata={"help": "TRL's name of eval_num_generations."})
    shuffle_dataset: bool = of_trl(True, "train_sampling_strategy: sequential")
    pad_to_multiple_of: int | None = of_trl(None, "leave it out; batching: shared_prefix pads nothing")
    generation_batch_size: int | None = of_trl(None, "num_mini_batches, optimiser steps per pass over a rollout")
    steps_per_generation: int | None = of_trl(None, "num_mini_batches, optimiser steps per pass over a rollout")
    use_vllm: bool = of_trl(False, VLLM)
    vllm_mode: str = of_trl("colocate", VLLM)
    vllm_gpu_memory_utilization: float | None = of_trl(None, "rollout: {backend: vllm, gpu_memory_utilization: ...}")
    vllm_server_base_url: str | None = of_trl(None, "rollout: {backend: server, urls: [...]} (docs/serving.md)")
    vllm_importance_sampling_correction: bool = of_trl(False, "rollout_correction: token_truncate or sequence_mask")
    normalize_advantages: bool = of_trl(False, "the method reinforce_pp, which whitens over the rollout")
    # ---- what does not exist here
    reward_clip_range: Any = of_trl(None, "clip inside the reward function; ReMax has reward_clip")
    multi_objective_aggregation: str = of_trl("sum_then_normalize", "method grpo, dynamic_weights or constraints")


def take_generation_kwargs(args: Any) -> None:
    """`generation_kwargs` as the options that they name. ConfigError for what would draw from a distribution whose
    probabilities are not known, and for two values of one option."""
    given = dict(args.generation_kwargs or {})
    if given.pop("do_sample", True) is not True:
        raise ConfigError("generation_kwargs: do_sample: false gives every sample of a prompt the same completion")
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
