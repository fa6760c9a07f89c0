"""What the stages of gpu/check.py share: shapes, lengths, clocks, and how parts are run."""

import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
Part = tuple[str, Callable[[], dict | str]]
"""A name, and a function that returns numbers, or a sentence that says why there are none."""

# Sizes of Qwen2.5, in a Llama (no bias on queries, keys and values); 0.49 and 1.54 billion parameters.
SHARED = {"vocab_size": 151_936, "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True}
SHAPES = {
    "0.5B": {
        **SHARED, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    },
    "1.5B": {
        **SHARED, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    },
}  # fmt: skip
SMALL = {
    **SHARED, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """device: cuda or cpu. small: tiny shapes and few repetitions."""

    device: str
    small: bool

    def __post_init__(self):
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("torch sees no GPU; --device cpu --small runs every stage on a CPU")

    @property
    def shapes(self) -> dict[str, dict]:
        return {"small": SMALL} if self.small else SHAPES

    @property
    def first_shape(self) -> dict:
        return next(iter(self.shapes.values()))

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: bfloat16 where a GPU is, else float32."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def options(self) -> dict:
        """Of transformers' TrainingArguments, for both sides of every comparison."""
        cuda = self.device == "cuda"
        return {"use_cpu": not cuda, "bf16": cuda, "gradient_checkpointing": False}

    def card(self) -> str:
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else platform.machine()
        return f"CPU: {name}, {torch.get_num_threads()} of {os.cpu_count()} threads"

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        self.synchronize()
        return time.perf_counter()

    def model(self, shape: dict | None = None, seed: int = 0, **ids):
        """A Llama with random weights in float32, drawn on the device. ids: its special tokens."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(**{**(shape or self.first_shape), "bos_token_id": None, "eos_token_id": None, **ids})
        with torch.device(self.device):
            return LlamaForCausalLM(config)


def seconds_left() -> float:
    """Until the stage is stopped."""
    return float(os.environ.get("ALIGN_STAGE_ENDS", "inf")) - time.time()


def run_parts(setting: Setting, parts: Iterable[Part]) -> Iterator[dict]:
    """The card, then {"running": name} as a part begins and {name: result} as it ends. A part that raises has the end
    of its traceback there, and the next is run: what a GPU can show is not to be lost to the first fault."""
    yield {"card": setting.card()}
    for name, part in parts:
        yield {"running": name}
        start = setting.clock()
        try:
            result = part()
        except (Exception, SystemExit) as error:
            lines = traceback.format_exception(error)
            result = {"failed": "".join(lines)[-1500:]}
        if isinstance(result, dict):
            result["part_seconds"] = round(setting.clock() - start, 2)
        yield {name: result}
    yield {"running": None}


def hh_lengths() -> list[list[int]]:
    """Tokens of [prompt, chosen, rejected] of 256 pairs of hh-rlhf (harmless), drawn at random among those of at most
    1,024 tokens, with SmolLM2's tokenizer."""
    return json.loads((HERE / "hh_lengths.json").read_text())


def spread(values: list[float]) -> dict:
    """Median and range, and the values themselves."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {**{name: round(value, 4) for name, value in numbers.items()}, "each": [round(v, 4) for v in values]}


def median_seconds(setting: Setting, work: Callable[[], object], repetitions: int) -> float:
    """Of one call, after three that are not counted."""
    seconds = []
    for number in range(-3, repetitions):
        start = setting.clock()
        work()
        if number >= 0:
            seconds.append(setting.clock() - start)
    return statistics.median(seconds)


def matmul_flops(setting: Setting, dtype: torch.dtype | None = None) -> float:
    """Measured floating-point operations per second of one large matrix product."""
    size = 128 if setting.small else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype or setting.dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(setting, lambda: a @ b, 10)


def completed(engine, prompts: list[list[int]], params: list) -> list[list[int]]:
    """The tokens that an engine draws. Raises where it does not tell what is done as it is."""
    told: dict[int, list] = {}
    rollouts = engine.generate(prompts, params, on_done=told.__setitem__)
    if told != {index: rollout.completions for index, rollout in enumerate(rollouts)}:
        raise AssertionError("on_done was told other completions than generate returned")
    return [rollout.completions[0].token_ids for rollout in rollouts]
