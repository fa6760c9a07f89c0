"""`num_logged_completions` of trainers on demonstrations and pairs: what the policy answers to a few prompts.

The answers are greedy and made by the model that is trained, so nothing is copied and no random number is drawn. Every
process takes a share of the prompts and makes as many passes as the slowest.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback
from trl import LogCompletionsCallback, WeaveCallback

from align.data.ending import written_text
from align.data.limits import longest_input
from align.data.sets import rows_of
from align.distributed.ranks import shared
from align.distributed.shards import outputs_as_computed
from align.errors import ConfigError
from align.evaluation.completions_file import CompletionsWriter
from align.modeling.logprobs import language_model
from align.modeling.types import Model
from align.rollout.engine import end_tokens
from align.rollout.transformers_engine import left_padded
from align.trainers.core.hooks import TrainingSettings


@dataclass
class EvalCompletionsOptions(TrainingSettings):
    num_logged_completions: int = field(
        default=0,
        metadata={
            "help": "Evaluation prompts that the policy answers, greedily, at every evaluation: printed, sent to wandb "
            "and kept in completions.jsonl. 0: none."
        },
    )
    max_new_tokens: int = field(
        default=128, metadata={"help": "With num_logged_completions: the longest answer, in tokens."}
    )


def show_completions(trainer: Any, rows: Dataset | dict[str, Dataset] | None) -> None:
    """What a trainer with `EvalCompletionsOptions` calls once it is made. rows: its evaluation set, tokenised; of
    several the first is used."""
    if trainer.args.num_logged_completions:
        trainer.add_callback(EvalCompletions(trainer, rows))


def check_prompts(callback: Any) -> None:
    """ConfigError for a callback of TRL's that has the policy answer a column of prompts that the evaluation rows do
    not have, here those of pairs: it would end the run at its first step."""
    rows = getattr(callback, "eval_dataset", None)
    if isinstance(callback, LogCompletionsCallback | WeaveCallback) and "prompt" not in getattr(
        rows, "column_names", ["prompt"]
    ):
        raise ConfigError(
            f"{type(callback).__name__} reads the column prompt of the evaluation rows, which are tokens here without "
            "one. Instead: num_logged_completions and max_new_tokens of the configuration (SFT and preferences)"
        )


class EvalCompletions(TrainerCallback):
    """Answers at the evaluations of a training run, each step once. ConfigError for what has no prompts, and for FSDP
    and DeepSpeed: that every process makes equally many passes has not been tried there."""

    def __init__(self, trainer: Any, rows: Dataset | dict[str, Dataset] | None):
        args = trainer.args
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ConfigError(
                "num_logged_completions works in one process and under DDP, not with sharded weights (FSDP, "
                "DeepSpeed): leave it out and look at the run with align generate",
                key="num_logged_completions",
            )
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        if rows is None:
            raise ConfigError(
                "num_logged_completions asks evaluation prompts, and there are none: give an evaluation set "
                "(eval_strategy, dataset_test_split), or leave it out",
                key="num_logged_completions",
            )
        room = longest_input(trainer.model)
        longest = None if room is None else room - args.max_new_tokens
        self.trainer = trainer
        self.prompts = prompts_of(rows, args.num_logged_completions, longest)
        if not self.prompts:
            raise ConfigError(
                "num_logged_completions: no evaluation row has a prompt (text without one is continued by nothing) "
                f"that leaves room for max_new_tokens {args.max_new_tokens}" + (f" of {room} tokens" if room else ""),
                key="num_logged_completions",
            )
        self.ends = end_tokens(language_model(trainer.model), trainer.processing_class)
        self.writer: CompletionsWriter | None = None
        self.done: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.done = None
        if state.is_world_process_zero:
            self.writer = CompletionsWriter(args.output_dir, self.trainer.resume_step)
            self.done = self.writer.last_step
        self.done = shared(self.done)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not state.max_steps or (self.done is not None and state.global_step <= self.done):
            return  # no run has begun, or this step's evaluation of another set
        self.done = state.global_step
        with self.trainer.phase("evaluate"):
            samples = self._samples(model)
        if self.writer is None:
            return
        self.writer.write(state.global_step, samples)
        rows = [[state.global_step, sample["prompt"], sample["completion"]] for sample in samples]
        self.trainer.log_table("eval_completions", ["step", "prompt", "completion"], rows)
        for sample in samples:
            cut = "" if sample["ended"] else f" (cut at {args.max_new_tokens} tokens)"
            tqdm.write(f"---- step {state.global_step}\n{sample['prompt']}\n>>>> {sample['completion']}{cut}")

    def _samples(self, model: Model) -> list[dict[str, Any]]:
        """On all processes: the prompts with what the policy writes."""
        trainer, args = self.trainer, self.trainer.args
        share = -(-len(self.prompts) // args.world_size)
        own = [(i * args.world_size + args.process_index) % len(self.prompts) for i in range(share)]
        written = greedy_answers(
            model,
            [self.prompts[i] for i in own],
            ends=self.ends,
            most=args.max_new_tokens,
            all_ended=partial(self._everywhere, model),
        )
        tokenizer = trainer.processing_class
        found = {
            index: {
                "prompt": tokenizer.decode(self.prompts[index], skip_special_tokens=True).strip(),
                "completion": written_text(tokenizer, ids, ended),
                "ended": ended,
            }
            for index, (ids, ended) in zip(own, written, strict=True)
        }
        found = {index: sample for part in gather_object([found]) for index, sample in part.items()}
        return [found[index] for index in range(len(self.prompts))]

    def _everywhere(self, model: Model, ended: bool) -> bool:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return ended
        return bool(accelerator.gather(torch.tensor([ended], device=accelerator.device)).all())


def prompts_of(rows: Dataset, count: int, longest: int | None) -> list[list[int]]:
    """The first `count` different prompts of tokenised rows (pairs, labelled answers, completions), of at most
    `longest` tokens."""
    found: dict[tuple[int, ...], None] = {}
    wanted = [name for name in ("prompt_ids", "input_ids", "completion_mask", "labels") if name in rows.column_names]
    for row in rows_of(rows, wanted):
        prompt = tuple(row["prompt_ids"] if "prompt_ids" in row else _before_the_answer(row))
        if prompt and (longest is None or len(prompt) <= longest):
            found[prompt] = None
        if len(found) == count:
            break
    return [list(prompt) for prompt in found]


def _before_the_answer(row: dict[str, list[int]]) -> Sequence[int]:
    """The tokens before the first trained one; none where every token is trained."""
    mask = row.get("completion_mask") or [label >= 0 for label in row.get("labels", [1])]
    return row["input_ids"][: next((i for i, trained in enumerate(mask) if trained), 0)]


@torch.no_grad()
def greedy_answers(
    model: Model, prompts: list[list[int]], *, ends: Sequence[int], most: int, all_ended: Callable[[bool], bool]
) -> list[tuple[list[int], bool]]:
    """(tokens, whether they ended by themselves) of the likeliest continuation of each prompt, token by token.

    all_ended: from whether all prompts here have ended to whether those of all processes have.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    accepted = inspect.signature(type(language_model(model)).forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    written: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    tokens, mask = left_padded(prompts, device)
    cache = None
    with outputs_as_computed(model):
        for _ in range(most):
            if "position_ids" in accepted:
                options["position_ids"] = _positions(mask)[:, -tokens.shape[1] :]
            output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
            cache = output.past_key_values
            likeliest = output.logits[:, -1].argmax(-1)
            for row, token in enumerate(likeliest.tolist()):
                if not ended[row]:
                    written[row].append(token)
                    ended[row] = token in ends
            if all_ended(all(ended)):
                break
            tokens, mask = likeliest[:, None], torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    model.train(was_training)
    return list(zip(written, ended, strict=True))


def _positions(mask: Tensor) -> Tensor:
    """Of left-padded rows [B, T], counted from their first token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
