"""The types of the two classes behind hooks.py, as far as they are used here: mypy does not read transformers, which
takes it minutes. A name that is missing here is an error of the type checker: add it with its type."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import CallbackHandler

from align.modeling.types import Model

OVERRIDDEN: tuple[str, ...]

def check_overridden(base: type) -> None: ...

class TrainingSettings:
    """Of transformers' `TrainingArguments`, once it has filled in its defaults."""

    output_dir: str
    resume_from_checkpoint: str | None
    run_name: str | None
    report_to: list[str]
    hub_token: str | None
    accelerator_config: Any
    seed: int
    data_seed: int | None
    use_cpu: bool
    fp16: bool
    bf16: bool | None
    gradient_checkpointing: bool | None
    gradient_checkpointing_kwargs: dict[str, Any] | None
    ddp_find_unused_parameters: bool | None
    disable_tqdm: bool
    dataloader_pin_memory: bool
    ddp_timeout: float
    dataloader_num_workers: int
    dataloader_prefetch_factor: int | None
    load_best_model_at_end: bool
    max_steps: int
    metric_for_best_model: str | None
    eval_on_start: bool
    do_eval: bool
    eval_strategy: Any
    logging_steps: float
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    gradient_accumulation_steps: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    save_only_model: bool
    save_total_limit: int | None
    push_to_hub: bool
    remove_unused_columns: bool
    torch_compile: bool
    label_smoothing_factor: float
    @property
    def device(self) -> torch.device: ...
    @property
    def process_index(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def should_save(self) -> bool: ...
    @property
    def train_batch_size(self) -> int: ...
    @property
    def eval_batch_size(self) -> int: ...
    def __post_init__(self) -> None: ...

class TrainerHooks:
    """Of transformers' `Trainer`: its attributes, and the methods that are called or overridden."""

    model: Model
    model_wrapped: nn.Module
    accelerator: Accelerator
    optimizer: Any
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    processing_class: PreTrainedTokenizerBase
    train_dataset: Any
    data_collator: Any
    optimizer_cls_and_kwargs: Any
    eval_dataset: Dataset | dict[str, Dataset] | None
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    is_in_train: bool
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    model_accepts_loss_kwargs: bool
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def pop_callback(self, callback: type[TrainerCallback]) -> TrainerCallback | None: ...
    def add_callback(self, callback: TrainerCallback) -> None: ...
    def is_world_process_zero(self) -> bool: ...
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...
    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]: ...
    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor: ...
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any: ...
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any: ...
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...
    def init_hf_repo(self, token: str | None = None) -> None: ...
    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any: ...
    def _finish_current_push(self) -> None: ...
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None: ...
    def get_train_dataloader(self) -> DataLoader: ...
    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader: ...
    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader: ...
    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any: ...
    def floating_point_ops(self, inputs: Any) -> int: ...
    def _prepare_input(self, data: Any) -> Any: ...
    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]: ...
    def _track_num_input_tokens(self, inputs: Any) -> None: ...
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None: ...
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None: ...
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool: ...
    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None: ...
    def _get_output_dir(self, trial: Any) -> str: ...
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None: ...
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None: ...
    def _load_best_model(self) -> None: ...
