"""The type of models in annotations."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel  # of a causal language model, a classifier, or an encoder
else:  # importing transformers takes seconds, and what is annotated is checked where it is used
    from torch.nn import Module as Model

__all__ = ["Model"]
