"""The section `rollout` of a configuration: which back-end completes prompts, and its options. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from align.config.sections import Section

# torch.bfloat16 as well as its name
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    BeforeValidator(lambda value: None if value is None else str(value).removeprefix("torch.")),
]
# What `vllm_engine` gives to vLLM itself: the policy, the options of this section or the proof of weights decide it.
SET_BY_ALIGN = (
    *("model", "tokenizer", "skip_tokenizer_init", "hf_overrides", "dtype", "quantization", "load_format"),
    *("model_loader_extra_config", "model_impl", "generation_config", "logprobs_mode", "seed", "disable_log_stats"),
    *("max_model_len", "max_num_seqs", "gpu_memory_utilization", "kv_cache_memory_bytes", "enable_sleep_mode"),
    *("enable_lora", "max_loras", "max_lora_rank", "lora_dtype", "distributed_executor_backend"),
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
    *("worker_extension_cls", "weight_transfer_config"),
)


class RolloutOptions(Section):
    """The options that every back-end has. A back-end with more of them extends this class (`register_engine`).

    `backend` is a name of the table in `align.rollout.make`; "auto" is vLLM where it is installed, else transformers.
    """

    backend: str = Field(
        "auto", description="auto (vLLM where installed), vllm, server, transformers, or a registered name."
    )
    max_num_seqs: int = Field(256, ge=1, description="Sequences that the engine decodes at a time.")
    dtype: Dtype = Field(
        None,
        description="float32, bfloat16 or float16: of the engine's weights. Default: what the policy computes in.",
    )
    sync_tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest mean difference of log-probs (nats) between engine and trainer that is taken for "
        "rounding. Default: what rounding in every layer explains, measured on the model.",
    )

    @property
    def sharing(self) -> int:
        """Processes of the run that share an engine."""
        return 1

    def given(self) -> dict[str, Any]:
        return {"backend": self.backend, **super().given()}

    def engine_arguments(self) -> dict[str, Any]:
        """Every option but the back-end's name, as keyword arguments of the engine."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "backend"}


class VLLMSettings(RolloutOptions):
    """What vLLM is started with, in the trainer's process or as a server."""

    gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="vLLM's share of the GPU's memory, weights included; CUDA only."
    )
    kv_cache_gib: float | None = Field(
        None, gt=0, description="Size of the key-value cache. Default: computed on CPUs, vLLM's on GPUs."
    )
    engine_options: dict[str, Any] = Field(
        {}, description="Further arguments of vLLM's engine by their name, as {enforce_eager: true}."
    )

    @field_validator("engine_options")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        clash = [name for name in value if name in SET_BY_ALIGN]
        if clash:
            own = [name for name in clash if name in cls.model_fields]
            place = f"set rollout.{own[0]}" if own else "leave it out"
            raise ValueError(f"{clash[0]} follows from the policy and the options beside engine_options: {place}")
        return value


class VLLMOptions(VLLMSettings):
    """vLLM in the trainer's process."""

    label = "backend vllm"
    backend: Literal["vllm"] = Field("vllm", description="vLLM in the trainer's process.")
    tensor_parallel: int = Field(
        1, ge=1, description="Processes of the run that share an engine, each with a slice of its weights."
    )
    sleep: bool = Field(
        False,
        description="Give the engine's GPU memory back while the policy trains (vLLM's sleep mode; CUDA only).",
    )

    @property
    def sharing(self) -> int:
        return self.tensor_parallel
