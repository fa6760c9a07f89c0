"""Supervised fine-tuning: TRL's SFTTrainer on rows that `align.data` has checked and tokenised."""

from dataclasses import dataclass, field

import trl
from torch import nn

from align.data.tokenize import tokenize_completions
from align.errors import ConfigError
from align.modeling.load import load_policy, load_tokenizer
from trainers.base import RunOptions, TrainerMixin


@dataclass
class SFTConfig(RunOptions, trl.SFTConfig):
    """TRL's options. Rows are tokenised here, with the loss on completions and assistant turns only, so TRL's own
    settings for that are left alone."""

    max_length: int | None = field(
        default=1024, metadata={"help": "Prompt and completion together, in tokens; longer completions are cut."}
    )

    def __post_init__(self):
        super().__post_init__()
        owned = {"completion_only_loss": None, "assistant_only_loss": False, "dataset_kwargs": None, "eos_token": None}
        changed = [name for name, default in owned.items() if getattr(self, name) != default]
        if changed:
            raise ConfigError(f"{', '.join(changed)}: the loss mask follows from the dataset's format, see docs/data.md")


class SFTTrainer(TrainerMixin, trl.SFTTrainer):
    """Fine-tune on prompt-completion or language-modeling rows; of preference rows, on the chosen completions."""

    _tag_names = ["align", "sft"]

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
    ):
        processing_class = processing_class or load_tokenizer(model)
        tokenize = {"tokenizer": processing_class, "max_length": args.max_length, "max_bad_share": args.max_bad_share}
        train_dataset = tokenize_completions(train_dataset, **tokenize)
        if eval_dataset is not None:
            eval_dataset = tokenize_completions(eval_dataset, **tokenize)
        # TRL makes the labels from `completion_mask`, and packs where asked
        args.completion_only_loss = True
        super().__init__(
            model=load_policy(model),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )

