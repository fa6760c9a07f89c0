"""Supervised fine-tuning: TRL's SFTTrainer on rows that `align.data` has checked and tokenised."""

from dataclasses import dataclass, field

import torch
import trl
from accelerate.utils import gather_object
from torch import nn
from transformers import set_seed

from align.data.collate import IGNORED
from align.data.tokenize import tokenize_completions
from align.errors import ConfigError, DataError
from align.modeling.adapters import check_stack
from align.modeling.load import load_policy, load_tokenizer, train_in_float32
from align.trainers.core.options import RunOptions
from align.trainers.core.trainer import TrainerMixin


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
            raise ConfigError(
                f"{', '.join(changed)}: the loss mask follows from the dataset's format, see docs/data.md"
            )


class SFTTrainer(TrainerMixin, trl.SFTTrainer):
    """Fine-tune on prompt-completion or language-modeling rows; of preference rows, on the chosen completions.

    Args:
        model: a model, a folder or a hub name.
        train_dataset, eval_dataset: demonstrations in TRL's formats (docs/data.md), or the output of
            `tokenize_completions`.
        peft_config: trains an adapter.
    """

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
        if not isinstance(model, nn.Module):
            # the frozen weights under an adapter stay as they were saved on a GPU; TRL adds the adapter
            dtype = "auto" if peft_config is not None and torch.cuda.is_available() else None
            model = load_policy(model, dtype=dtype, sharded=True)
        else:
            train_in_float32(model, adapter=peft_config is not None)
        if peft_config is not None:
            check_stack(model, peft_config)
            set_seed(args.seed)  # TRL draws the adapter
        # TRL makes the labels from `completion_mask`, and packs where asked
        args.completion_only_loss = True
        super().__init__(
            model=model,
            args=args,
            train_dataset=tokenized_completions(train_dataset, processing_class, args),
            eval_dataset=None if eval_dataset is None else tokenized_completions(eval_dataset, processing_class, args),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """As transformers' `evaluate`; `eval_dataset` is tokenised as the training rows are."""
        if eval_dataset is not None:
            eval_dataset = tokenized_completions(eval_dataset, self.processing_class, self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """With the loss per trained token of the whole set: transformers' mean of the batches' means depends on how the
        rows are cut into batches. (Rows that fill up the last batch of several processes count twice.)"""
        self._eval_loss, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        losses, tokens = zip(*gather_object([(self._eval_loss, self._eval_tokens)]), strict=True)
        output.metrics[f"{metric_key_prefix}_loss"] = sum(losses) / sum(tokens)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = inputs["labels"][..., 1:].ne(IGNORED).sum().item()
        self._eval_loss += loss.item() * tokens
        self._eval_tokens += tokens
        return loss, logits, labels


def tokenized_completions(dataset, tokenizer, args: SFTConfig):
    """Rows as TRL's trainer takes them. A dataset that is tokenised already is taken as it is, unless it has a row
    without a trained token: TRL would drop that without a word."""
    if "input_ids" not in dataset.column_names:
        return tokenize_completions(dataset, tokenizer, max_length=args.max_length, max_bad_share=args.max_bad_share)
    if "completion_mask" in dataset.column_names:
        empty = [row for row, mask in enumerate(dataset["completion_mask"]) if not any(mask[1:])]
        if empty:
            raise DataError(f"{len(empty)} tokenised rows train no token: rows {empty[:10]}")
    return dataset
