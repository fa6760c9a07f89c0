"""Stage `memory` of gpu/check.py: the peak memory of training steps against the estimate of `align ... --dry-run`.

On a GPU the peak is the allocator's. On a CPU it is that of the resident set beyond what it was before the model was
made, and of the first case alone: the process keeps what that has freed, so that the others seem to need nothing. Every
sequence has the length that the estimate is made for.
"""

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from worlds.on_policy import make_tokenizer

from align.cli.estimate import estimate, model_shape
from benchmarks.gpu.common import SHAPES, SMALL, Part, Setting

CPU_SHAPE = {**SMALL, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 4096}


def parts(setting: Setting) -> Iterator[Part]:
    cases = {
        "dpo": {},
        "dpo_checkpointing": {"gradient_checkpointing": True},
        "dpo_lora": {"lora": True},
        "reward": {"reward": True},
    }
    for name, options in cases.items():
        seen = setting.device == "cuda" or name == "dpo"
        yield name, lambda options=options, seen=seen: measured(setting, seen, **options)


def measured(setting: Setting, seen: bool, reward: bool = False, lora: bool = False, **options) -> dict:
    """GiB that two steps took at most (unless that cannot be `seen`), and GiB that they were estimated to take."""
    from peft import LoraConfig

    shape = CPU_SHAPE if setting.small else SHAPES["0.5B"]
    pairs, half = (4, 64) if setting.small else (16, 256)
    tokenizer = make_tokenizer(shape["vocab_size"])
    peft_config = LoraConfig(r=16, target_modules="all-linear") if lora else None
    peak = Peak(setting)
    with tempfile.TemporaryDirectory() as folder:
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        trainer = make(setting, shape, ids, tokenizer, pairs, half, Path(folder), reward, peft_config, options)
        trainer.train()
        took = peak()
        args, config = trainer.args, trainer.model.config
    found = estimate(
        model_shape(config, dtype="float32", classifier=reward, peft_config=peft_config),
        optim=args.optim.value,
        mixed=bool(args.bf16 or args.fp16),
        checkpointing=bool(args.gradient_checkpointing),
        tokens=pairs * 3 * half,  # a prompt is shared by its two completions
        logits=not reward,
        reference=not reward and not lora,
    )
    return {
        "peak_gib": round(took / 2**30, 3) if seen else None,
        "estimated_gib": round(found.total / 2**30, 3),
        "estimate_over_peak": round(found.total / took, 3) if seen else None,
        "estimated_parts_gib": {part.name: round(part.bytes / 2**30, 3) for part in found.parts},
    }


def make(setting, shape, ids, tokenizer, pairs, half, folder, reward, peft_config, options):
    """A trainer of batches in which every sequence has a prompt and a completion of `half` tokens."""
    from align import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(2, shape["vocab_size"], (half - 1,), generator=generator).tolist()  # noqa: E731
    words = lambda: " ".join(f"w{i}" for i in draw())  # noqa: E731
    rows = [{"prompt": f"{words()} ", "chosen": words(), "rejected": words()} for _ in range(2 * pairs)]
    settings = {
        "output_dir": str(folder / "run"), "per_device_train_batch_size": pairs, "max_steps": 2, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, **setting.options, **options,
    }  # fmt: skip
    config, trainer = (RewardConfig, RewardTrainer) if reward else (DPOConfig, DPOTrainer)
    setting.model(shape, **ids).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return trainer(
        str(folder / "model"), config(**settings), Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=peft_config,
    )  # fmt: skip


class Peak:
    """Bytes at most since this was made, over what was held then."""

    def __init__(self, setting: Setting):
        self.cuda = setting.device == "cuda"
        gc.collect()  # the trainer of the case before, which would be given back during this one
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = resident("VmRSS")

    def __call__(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")) - self.before


def resident(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
