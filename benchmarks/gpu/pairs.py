"""Stage `pairs` of gpu/check.py: training on pairs of hh-rlhf's lengths, DPO against TRL's trainer.

The comparison is `benchmarks/dpo_vs_trl.py`'s: TRL's settings (the whole step in one batch, or micro-batches of pairs
sorted by length) are tried first, and its fastest takes turns with ours on further pairs; the losses of both sides must
agree. Here the model is a random one of 0.5 or 1.5 billion parameters, its text random words.

Tokens are those of prompt and completion of both sides of a pair, so a prompt counts twice, for TRL and for us. MFU is
of the measured matrix-product peak, and counts the arithmetic that the pairs need with their prompt computed once: 2
operations per weight and token in a forward pass, 4 more in a backward pass, the head for completions alone, attention
not counted. A live reference is one more forward pass.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from dpo_vs_trl import compare, of_ours, of_trl, options, run
from worlds.on_policy import make_tokenizer

from benchmarks.gpu.common import Part, Setting, hh_lengths, matmul_flops, spread


def parts(setting: Setting) -> Iterator[Part]:
    with tempfile.TemporaryDirectory() as folder:
        world = Pairs(setting, Path(folder))
        first, *larger = setting.shapes
        yield f"dpo_{first}_live", lambda: world.against_trl(first, cached=False)
        yield f"dpo_{first}_cached", lambda: world.against_trl(first, cached=True)
        for name in larger:
            yield f"dpo_{name}_live", lambda name=name: world.against_trl(name, cached=False)
        yield "reward", world.reward
        yield "sparsepo", world.sparsepo
        for name in larger:
            yield f"dpo_{name}_cached", lambda name=name: world.against_trl(name, cached=True)


class Pairs:
    """Models by shape, made once, and pairs that all sides take in the same order."""

    def __init__(self, setting: Setting, folder: Path):
        self.setting, self.folder = setting, folder
        self.args = argparse.Namespace(
            pairs=4 if setting.small else 32,
            steps=3 if setting.small else 5,
            trial_steps=2 if setting.small else 3,
            repetitions=1 if setting.small else 2,
            trl_micro=[2, 4] if setting.small else [16, 32],  # smaller ones were half as fast on an H200
            ours_micro=None,
            plain=False,  # only TRL's fastest setting takes turns with ours
            device_options=setting.options,
            tolerance=1e-4 if setting.device == "cpu" else 5e-2,
        )
        self.tokenizer = make_tokenizer(setting.first_shape["vocab_size"])
        self.peak = matmul_flops(setting)
        self.made: dict[str, dict] = {}
        self.fastest: dict[str, int] = {}  # pairs per micro-batch of TRL with a live reference, by shape

    def folder_of(self, name: str) -> str:
        """The model as both sides load it: float32 weights, which they train under bfloat16 autocast on a GPU."""
        folder = self.folder / name
        if not folder.exists():
            ids = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
            model = self.setting.model(self.setting.shapes[name], **ids)
            head = model.lm_head.weight.numel()
            self.made[name] = {"head": head, "layers": sum(p.numel() for p in model.model.layers.parameters())}
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return str(folder)

    def pairs(self, count: int) -> Dataset:
        """Random words, one token each, with the lengths of hh-rlhf in turn; in --small an eighth of them."""
        shrink = 8 if self.setting.small else 1
        generator, vocabulary, rows = torch.Generator().manual_seed(0), len(self.tokenizer), []
        table = hh_lengths()
        for number in range(count):
            lengths = [max(1, length // shrink) for length in table[number % len(table)]]
            drawn = [torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in lengths]
            prompt, chosen, rejected = (" ".join(f"w{i}" for i in ids) for ids in drawn)
            rows.append({"prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected})
        from align.data import tokenize_pairs

        return tokenize_pairs(Dataset.from_list(rows), self.tokenizer, max_length=None)

    def against_trl(self, name: str, cached: bool) -> dict:
        args = argparse.Namespace(**vars(self.args))
        if cached and name in self.fastest:
            args.trl_micro = [self.fastest[name]]  # tried with a live reference
        elif self.fastest:
            best = min(self.fastest.values())
            args.trl_micro = [best // 2, best]  # tried on the smaller model
        model, pairs = self.folder_of(name), self.pairs(args.pairs * args.steps * (args.repetitions + 1))
        self.warm(model, pairs, cached)
        *_, found = compare(model, pairs, args, cached, self.folder / "run")
        best = found["trl_best_setting"]
        self.fastest.setdefault(name, args.pairs if best == "whole step" else int(best.split()[0]))
        clock = "wall" if self.setting.device == "cuda" else "cpu"
        work = self.work(name, pairs, live=not cached)
        sides = {}
        for side in ("ours", "trl best"):
            per_second = found[f"pairs_per_second_{clock}"][side]
            sides[side] = {
                "tokens_per_second": round(per_second * work["tokens"]),
                "mfu": round(per_second * work["flops"] / self.peak, 4),
            }
        return {
            "times_faster_than_trl": spread(found[f"times_faster_than_trl_best_{clock}"]["each"]),
            **sides,
            "clock": clock,
            "trl_settings_tried": found["trl_settings_tried"],
            "trl_best_setting": best,
            "largest_relative_difference_of_losses": found["largest_relative_difference_of_losses"],
            "peak_gib": found.get("peak_gib"),
            "compilations": self.compilations(),
        }

    def compilations(self) -> int:
        """Graphs compiled in this process until now: FlexAttention's, for shapes and passes of models."""
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def warm(self, model: str, pairs: Dataset, cached: bool) -> None:
        """Kernels are compiled on both sides before anything is timed."""
        for make in (of_ours, of_trl):
            settings = options(self.folder / "run", self.args, self.args.pairs // 2, 2, cached)
            run(make, model, pairs.select(range(2 * self.args.pairs), keep_in_memory=True), settings)

    def work(self, name: str, pairs: Dataset, live: bool, head: bool = True) -> dict:
        """Of a pair, on average: tokens with the prompt in both sequences, and operations with it once."""
        lengths = [[len(row[column]) for column in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in pairs]
        prompt, chosen, rejected = (sum(column) / len(lengths) for column in zip(*lengths, strict=True))
        size = self.made[name]
        once = size["layers"] * (prompt + chosen + rejected) + size["head"] * (chosen + rejected) * head
        return {"tokens": 2 * prompt + chosen + rejected, "flops": (6 + 2 * live) * once}

    def alone(self, make, live: bool, head: bool = True) -> dict:
        """Tokens per second of one of our trainers, and the largest step beside the median one (compilation)."""
        name = next(iter(self.setting.shapes))
        model, pairs = self.folder_of(name), self.pairs(self.args.pairs * (self.args.steps + 2))
        settings = options(self.folder / "run", self.args, self.args.pairs, self.args.steps + 2, False)
        for key in ("precompute_ref_log_probs", "beta"):
            settings.pop(key)
        found = run(make, model, pairs, settings)
        steps = spread(found["wall"][1:])
        work = self.work(name, pairs, live, head)
        per_second = self.args.pairs / steps["median"]
        return {
            "tokens_per_second": round(per_second * work["tokens"]),
            "mfu": round(per_second * work["flops"] / self.peak, 4),
            "seconds_per_step": steps,
            "peak_gib": round(found["peak"] / 2**30, 2),
            "compilations": self.compilations(),
        }

    def sparsepo(self) -> dict:
        from align import SparsePOConfig, SparsePOTrainer

        return self.alone(
            lambda model, pairs, settings: SparsePOTrainer(model, SparsePOConfig(**settings), pairs), True
        )

    def reward(self) -> dict:
        from align import RewardConfig, RewardTrainer

        def make(model, pairs, settings):
            return RewardTrainer(model, RewardConfig(**settings), pairs)

        return self.alone(make, live=False, head=False)
