"""What supervised fine-tuning trains of a loaded model: all of it, half of it, or an adapter."""

from typing import Any

from align.errors import ConfigError
from align.modeling.adapters import check_stack
from align.modeling.half import freeze_half
from align.modeling.logprobs import language_model
from align.modeling.text_part import adapter_of_text, freeze_unreached


def choose_trained(model: Any, args: Any, peft_config: Any) -> Any:
    """Freezes what no text reaches and what `half_finetuning` asks for; the checked config of an adapter, or None."""
    freeze_unreached(language_model(model))
    if peft_config is not None:
        check_stack(model, peft_config)
        check_head(model, peft_config)
        peft_config = adapter_of_text(model, peft_config)
    if args.half_finetuning is None:
        return peft_config
    if peft_config is not None:
        raise ConfigError(
            "half_finetuning freezes half of the weights, and with peft_config all of them are frozen: leave one of "
            "the two out",
            key="half_finetuning",
        )
    freeze_half(model, f"{args.seed} {args.half_finetuning}")
    return None


def check_head(model: Any, peft_config: Any) -> None:
    """ConfigError for an adapter on the head, whose weight TRL's loss takes as it lies there."""
    from peft.tuners.tuners_utils import check_target_module_exists

    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    if getattr(peft_config, "target_modules", None) and any(check_target_module_exists(peft_config, n) for n in names):
        raise ConfigError(
            f"target_modules: {names[0]} is the model's head, and the loss takes the head's weight without what an "
            f"adapter adds to it, which would never be trained: leave it out of target_modules, or train it in full "
            f"(modules_to_save: [{names[0].rpartition('.')[2]}])"
        )
    tied = model.config.tie_word_embeddings
    if tied and getattr(peft_config, "trainable_token_indices", None):  # only LoRA has it
        raise ConfigError(
            "trainable_token_indices: the model's head is its input embeddings, and the loss takes the head's weight "
            "without the rows that an adapter trains: leave it out, or train the model in full"
        )
