"""What accelerate makes of a model when it is evaluated before it is trained, and trained again by another trainer.

It puts a mark on the model and leaves a marked one as it is. transformers evaluates an untrained model without DDP, and
so the training that follows had none: each process trained weights of its own, and said nothing. A model that another
trainer has trained would be computed with in that one's precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from align.distributed.fsdp2 import prepare_fsdp2
from align.distributed.shards import reshard
from align.distributed.shells import release
from align.errors import ConfigError
from align.trainers.core.best_metric import FindsBestMetric
from align.trainers.core.guards import check_trainable


class EvaluatesUntrained(FindsBestMetric):
    """Of every trainer."""

    _trained = False

    @property
    def untrained(self) -> bool:
        """Whether the weights are those that the trainer was made with. A second `train` counts steps from 0 again, and
        goes on with the weights of the first."""
        return self.state.global_step == 0 and not self._trained

    def __init__(self, *args: Any, **kwargs: Any):
        model = args[0] if args else kwargs.get("model")
        if isinstance(model, nn.Module):  # before TRL's SFT gives it another `forward`
            release(model)
        super().__init__(*args, **kwargs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around what an evaluation computes. Before the first training or evaluation the model gets the precision, the
        device and the shards of training; afterwards it has shards alone, which an optimiser may be made for."""
        accelerator = self.accelerator
        held = [accelerator.unwrap_model(model, keep_torch_compile=False) for model in accelerator._models]
        if not self.is_in_train and not any(model is self.model for model in held):
            self._prepare_untrained()
        yield
        if accelerator.is_fsdp2:
            reshard(self.model)

    def _prepare_untrained(self) -> None:
        accelerator = self.accelerator
        if self.is_deepspeed_enabled:
            raise ConfigError(
                "evaluate, predict: DeepSpeed has the model only once it trains: set eval_on_start: true to evaluate "
                "it at step 0, or evaluate without DeepSpeed"
            )
        if accelerator.is_fsdp2:  # accelerate's `prepare`, which transformers calls, takes no model without optimiser
            self.model = self.model_wrapped = prepare_fsdp2(accelerator, self.model)
            accelerator._models.append(self.model)
        else:
            accelerator.prepare_model(self.model, evaluation_mode=True)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.evaluating():
            return super().evaluation_loop(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        check_trainable(self.model)
        if self.model_wrapped is self.model and not self.is_fsdp_enabled:
            release(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._trained |= self.state.global_step > 0
