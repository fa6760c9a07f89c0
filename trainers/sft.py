"""Supervised fine-tuning: TRL's SFTTrainer on rows that `align.data` has checked and tokenised."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainingArguments

from align.data.cache import room_in
from align.data.checks import SCORE
from align.data.collate import labelled, with_labels
from align.data.formats import TEXT_COLUMNS, columns_of, format_for
from align.data.labels import IGNORED, LABELS, MASKS
from align.data.limits import fit_sets
from align.data.sets import of_each
from align.data.streams import is_stream, mapped, read_whole, sample_of
from align.data.tokenize import tokenize_completions
from align.distributed.shards import head_as_a_layer, outputs_as_computed
from align.errors import ConfigError, DataError
from align.modeling.adapters import adding_lora, by_names
from align.modeling.experts import experts_by_their_usual_name
from align.modeling.logprobs import language_model, soft_cap_by_its_usual_name
from align.trainers.core.eval_completions import show_completions
from align.trainers.core.experts import without_missing_loss
from align.trainers.core.loading import (
    load_to_train,
    tokenizer_of,
    training_tokenizer,
    with_template,
    without_weights,
)
from align.trainers.core.options import RunOptions
from align.trainers.core.trainer import TrainerMixin
from align.trainers.supervised.implicit import OF_STEP, check_options, for_model, implicit_rewards
from align.trainers.supervised.options import SupervisedOptions
from align.trainers.supervised.selection import token_selection
from align.trainers.supervised.tokenised import tokenised_rows
from align.trainers.supervised.trained import choose_trained

UNUSED = {  # options of TRL's that what is done here leaves without effect
    "dataset_text_field": "rename the column to 'text'",
    "truncation_mode": "leave it out: sequences lose their end",
    "pad_to_multiple_of": "leave it out",
    "pad_token": "set tokenizer.pad_token, and pass the tokenizer",
}
OWNED = {"completion_only_loss": None, "dataset_kwargs": None}
NEUTRAL = {"completion_only_loss": (None, True), "dataset_kwargs": (None, {}), "pad_to_multiple_of": ("auto", None)}


@dataclass
class SFTConfig(SupervisedOptions, RunOptions, trl.SFTConfig):
    """TRL's options. Rows are tokenised here, with the loss on completions and assistant turns only, so TRL's own
    settings for that are left alone."""

    max_length: int | None = field(
        default=1024, metadata={"help": "Prompt and completion together, in tokens; longer completions are cut."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_options(self)
        changed = [name for name, default in OWNED.items() if not self._neutral(name, default)]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)}: the loss mask follows from the dataset's format, see docs/data.md"
            )
        if self.loss_type == "dft" and self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor: loss_type dft takes the probability of each token as it is, without "
                "smoothing: leave one of the two out",
                key="label_smoothing_factor",
            )
        defaults = {item.name: item.default for item in fields(trl.SFTConfig)}
        if self.padding_free and self.eval_packing and not self.packing:
            raise ConfigError(
                "eval_packing: padding_free without packing trains one row per demonstration, and evaluates them so: "
                "leave it out, or set packing: true",
                key="eval_packing",
            )
        unused = [name for name in UNUSED if name in defaults and not self._neutral(name, defaults[name])]
        if unused:
            raise ConfigError("; ".join(f"{name} has no effect here: {UNUSED[name]}" for name in unused))

    def _neutral(self, name: str, default: Any) -> bool:
        return getattr(self, name) in NEUTRAL.get(name, (default,))


@contextmanager
def around_trl(policy, args: SFTConfig) -> Iterator[None]:
    """What TRL's trainer is made in."""
    with soft_cap_by_its_usual_name(policy), without_what_is_done(args), without_missing_loss(policy, args):
        with adding_lora(policy, said="target module"), room_in(None, "packs"):
            yield


class SFTTrainer(TrainerMixin, trl.SFTTrainer):
    """Fine-tune on prompt-completion or language-modeling rows; of preference rows, on the chosen completions.

    Args:
        model: a model, a folder or a hub name.
        args: may be transformers' own TrainingArguments.
        train_dataset, eval_dataset: demonstrations in TRL's formats (docs/data.md), or the output of
            `tokenize_completions`.
        peft_config: trains an adapter.
        ref_model: with `selective_tokens` or `implicit_reward_beta`, the reference: a model, a folder or a hub name.
        formatting_func: a row -> its text; the rows are then trained as `text`, every token of them.
        compute_metrics, preprocess_logits_for_metrics, optimizer_cls_and_kwargs: as transformers' Trainer has them.
        quantization_config: of transformers, for a model that is named; with peft_config.
    """

    _tag_names = ["align", "trl", "sft"]
    args: SFTConfig
    _total_train_tokens: int  # TRL's
    config_class = SFTConfig

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | TrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
        formatting_func: Callable[[dict], str] | None = None,
        compute_metrics: Callable | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        ref_model: str | nn.Module | None = None,
        quantization_config: Any = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ):
        if isinstance(args, TrainingArguments) and not isinstance(args, SFTConfig):
            args = with_own_defaults(args)
        args, peft_config = self.options(args, model, train_dataset), by_names(peft_config)
        self.args, self.formatting_func, self.user_metrics = args, formatting_func, compute_metrics
        self._longest_row = args.max_length
        processing_class = tokenizer_of(args, model, processing_class)
        adapter, empty = peft_config is not None, without_weights(args, model)
        named = partial(load_to_train, args, model, quantization_config, processing_class, adapter=adapter)
        load = with_template(args.chat_template_path, named, processing_class, adapter=adapter)
        self._renders = training_tokenizer(processing_class) if args.assistant_only_loss else processing_class
        train_rows = tokenized_completions(self._formatted(train_dataset), self._renders, args)
        eval_rows = of_each(eval_dataset, self._to_evaluate)
        if empty is not None:
            fit_sets(empty, self.longest_row, train_rows, eval_rows, processing_class)
        policy = load()  # once the rows are tokenised: reading the weights of a large model takes minutes
        peft_config = choose_trained(policy, args, peft_config)
        # TRL packs where asked, and makes the labels of streams
        args.completion_only_loss = True
        with args.main_process_first(desc="labels"), room_in(None, "labels of tokenised rows"):
            labelled_rows = train_rows if is_stream(train_rows) else with_labels(train_rows)
            labelled_eval = of_each(eval_rows, with_labels)
        with around_trl(policy, args):
            super().__init__(
                model=policy,
                args=args,
                train_dataset=labelled_rows,
                eval_dataset=labelled_eval,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                peft_config=peft_config,
                compute_metrics=compute_metrics,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        show_completions(self, eval_rows)
        self.selection = token_selection(self, ref_model)
        self.implicit = implicit_rewards(self, ref_model, scored=SCORE in columns_of(train_dataset, streams=True))
        if is_stream(train_dataset):
            self.make_endless(train_dataset)
        if not self.is_deepspeed_enabled:
            self._train_in_float32()

    @property
    def longest_row(self) -> int | None:
        return self._longest_row  # TRL is shown none

    def _train_in_float32(self) -> None:
        """TRL's adapters on 4-bit weights are in bfloat16, where small updates are rounded away."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _to_evaluate(self, rows):
        whole = read_whole(rows) if is_stream(rows) else rows
        return tokenized_completions(self._formatted(whole), self._renders, self.args)

    def _formatted(self, rows):
        """The rows as `text`, by `formatting_func`; as they are without one."""
        columns = columns_of(rows, streams=True)
        if self.formatting_func is None:
            return rows
        if "input_ids" in columns:
            raise ConfigError("formatting_func makes text of rows, and these are tokenised: leave it out")
        text = partial(_text_of, self.formatting_func)
        if is_stream(rows):
            return mapped(rows, lambda row, number: text(row))
        return rows.map(text, remove_columns=sorted(columns - {SCORE}), load_from_cache_file=False, desc="Formatting")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        compute_loss = super().compute_loss
        counted = counted_on_all(self.accelerator) if self.model.training else nullcontext()
        core = language_model(model)
        with outputs_as_computed(model), experts_by_their_usual_name(core), head_as_a_layer(core), counted:
            if self.implicit is not None and OF_STEP in inputs:
                loss = self.implicit.loss(compute_loss, model, inputs, num_items_in_batch)
            else:
                loss = compute_loss(model, for_model(inputs), return_outputs, num_items_in_batch)
        if self.model.training:
            self._count_by_token(inputs["labels"])
        return loss

    def _count_by_token(self, labels) -> None:
        """Entropy and accuracy of a micro-batch, for their means per trained token: TRL's means of the micro-batches'
        means depend on how a step is cut."""
        tokens = labels[..., 1:].ne(IGNORED).sum().item()
        for name in ("entropy", "mean_token_accuracy"):
            for value in self._metrics["train"].pop(name, ()):
                self.record(name, value, tokens)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self.args.implicit_reward_beta is not None and SCORE not in self._signature_columns:
            self._signature_columns.append(SCORE)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.selection is not None and batches:
            self.selection.narrow(self.model_wrapped, batches)
            count = self._get_num_items_in_batch(batches, device)
        if self.implicit is not None and batches:
            count = self.implicit.prepare(self.model_wrapped, batches, device)
        return batches, count

    def further_identity(self) -> dict:
        method = self.selection or self.implicit
        return {**super().further_identity(), **({} if method is None else method.reference.identity())}

    def extra_state(self) -> dict:
        method = self.selection or self.implicit
        of_reference = {} if method is None else method.reference.state()
        return {**super().extra_state(), "tokens": int(self._total_train_tokens), **of_reference}

    def train(self, *args, **kwargs):
        self._total_train_tokens = 0  # those of an earlier call are of other steps
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.resumed is not None and not self._total_train_tokens:  # which TRL counts and does not keep
            self._total_train_tokens = self.resumed.state.get("tokens", 0)
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """As transformers' `evaluate`; `eval_dataset` is tokenised as the training rows are."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):  # a name among several evaluation sets
            eval_dataset = of_each(eval_dataset, self._to_evaluate)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, *args, **kwargs):
        """As transformers' `predict`; rows as `evaluate` takes them, for which TRL makes the labels there alone."""
        rows = self._to_evaluate(test_dataset)
        rows = rows if "labels" in rows.column_names else rows.map(labelled, desc="Labels")
        return super().predict(rows, *args, **kwargs)

    def evaluation_metrics(self):
        of_experts = ["aux_loss"] if self.aux_loss_enabled else []
        return ["loss", "entropy", "mean_token_accuracy", "num_tokens", *of_experts]

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """With loss, entropy and accuracy per trained token of the whole set: the means of the batches' means that
        transformers and TRL take depend on how the rows are cut into batches."""
        self._eval_batches: list[tuple[float, int]] = []
        self._evaluated = dataloader.dataset
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # [processes, batches, (sum of losses, tokens)]
        batches = torch.tensor(gather_object([self._eval_batches]), dtype=torch.float64)
        loss, tokens = batches.sum((0, 1)).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        weights = batches[..., 1].sum(0)
        for name in [name for name in ("entropy", "mean_token_accuracy", "aux_loss") if name in self._metrics["eval"]]:
            # of each batch, over all processes; TRL would log it without the set's name
            means = torch.tensor(self._metrics["eval"].pop(name), dtype=torch.float64)
            output.metrics[f"{metric_key_prefix}_{name}"] = (means @ weights / tokens).item()
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._leave_out_repeated(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = inputs["labels"][..., 1:].ne(IGNORED).sum().item()
        # a batch of repeated rows alone has none; its mean is 0 / 0 with label smoothing
        self._eval_batches.append((loss.item() * tokens if tokens else 0.0, tokens))
        return loss, logits, labels

    def _leave_out_repeated(self, inputs: dict[str, Any]) -> None:
        """Rows that are repeated so that the last batches of all processes are full have been counted already."""
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if not state.end_of_dataloader or state.remainder <= 0:
            return
        first = size * self.accelerator.process_index
        own = min(max(0, state.remainder - first), size)  # rows of this process that are no repetition
        if self.padding_free:  # all rows are one, in the order of the data
            start = len(self._evaluated) - state.remainder + first
            rows = (self._evaluated[number]["input_ids"] for number in range(start, start + own))
            inputs["labels"][:, sum(map(len, rows)) :] = IGNORED
        else:
            inputs["labels"][own:] = IGNORED


@contextmanager
def counted_on_all(accelerator: Any) -> Iterator[None]:
    """Tokens of a step are those of all processes. TRL takes `gather_for_metrics`, which leaves processes out in the
    last step of an epoch whose rows do not fill it, and these have trained rows from the epoch's start."""
    accelerator.gather_for_metrics = accelerator.gather
    try:
        yield
    finally:
        del accelerator.gather_for_metrics


@contextmanager
def without_what_is_done(args: SFTConfig) -> Iterator[None]:
    """Options that have been used already: TRL would use them again, warn that it ignores them, or refuse them."""
    done: dict[str, Any] = {"model_init_kwargs": None, "chat_template_path": None, "assistant_only_loss": False}
    if cut_before(args):
        done["max_length"] = None
    given = {name: getattr(args, name) for name in done}
    for name, value in done.items():
        setattr(args, name, value)
    yield
    for name, value in given.items():
        setattr(args, name, value)


def cut_before(args: SFTConfig) -> bool:
    """Whether all rows are within `max_length` when TRL gets them. It cuts in packs, and row by row in Python."""
    return not args.packing and not args.eval_packing


def with_own_defaults(args: TrainingArguments) -> SFTConfig:
    """What transformers' own arguments say, as TRL takes them; where they leave the default, it is that of SFT."""
    defaults = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu)
    given = {f.name: getattr(args, f.name) for f in fields(TrainingArguments) if f.init}
    return SFTConfig(**{name: value for name, value in given.items() if value != getattr(defaults, name)} | {
        "output_dir": args.output_dir, "use_cpu": args.use_cpu
    })  # fmt: skip


def tokenized_completions(dataset, tokenizer, args: SFTConfig):
    """Rows as TRL's trainer takes them, a stream lazily; those that are tokenised already are checked."""
    columns = columns_of(dataset, streams=True)
    tokenised = "input_ids" in columns and (columns & {*MASKS, LABELS} or not columns & {*TEXT_COLUMNS})
    if not tokenised:
        if args.assistant_only_loss and not format_for(sample_of(dataset), "completions").conversational:
            raise ConfigError(
                "assistant_only_loss: the rows are text, which says no turns: leave it out, or give messages, whose "
                "assistant turns alone are trained with it or without",
                key="assistant_only_loss",
            )
        return tokenize_completions(
            dataset,
            tokenizer,
            max_length=args.max_length,
            max_bad_share=args.max_bad_share,
            num_proc=args.dataset_num_proc,
            scored=args.implicit_reward_beta is not None,
        )
    return tokenised_rows(
        dataset,
        limit=None if args.packing else args.max_length,
        cut=cut_before(args),
        scored=args.implicit_reward_beta is not None,
    )


def _text_of(function: Callable[[dict], str], row: dict) -> dict[str, str]:
    text = function(row)
    if not isinstance(text, str):
        raise DataError(f"formatting_func gave {type(text).__name__} instead of the text of one row: {text!r:.100}")
    return {"text": text, **({SCORE: row[SCORE]} if SCORE in row else {})}
