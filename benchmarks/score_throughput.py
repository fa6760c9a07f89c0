"""How fast `ClassifierReward` scores, next to transformers' text classification at its best batch size.

    python benchmarks/score_throughput.py causal|encoder [--repetitions 9] [--texts FILE.parquet] [--output FILE]

The same prompts and completions, as text, through the same model, a causal one or an encoder; every side tokenises
within the clock. The rivals:

pipeline     `transformers.pipeline("text-classification")` with `batch_size`, texts in the order in which they come
loop         a loop over batches of texts: tokenizer(batch, padding=True), model(**batch)
sorted loop  that loop over texts sorted by their length in characters, the best that its user can do without more code

Each rival's batch size is the fastest of `--sizes` in a sweep beforehand, two passes each. Then all sides take
turns, in an order that rotates. Scores must agree to 1e-3. A ratio is one repetition's time of the rival over ours, by
the wall clock and in processor time (which other work on the machine disturbs less): above 1 we are faster. Texts are
real where FILE (columns prompt, chosen) is given, and of random words with log-normal lengths otherwise; the tokenizer
is trained on them.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm, trange
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from align.reward_models.base import RewardBatch
from align.reward_models.classifier import ClassifierReward

RESULTS = Path(__file__).parent / "results"
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
LONGEST = 512


def texts(path: Path | None, count: int) -> tuple[list[str], list[str]]:
    """Prompts and completions."""
    if path is not None:
        import pandas as pd

        frame = pd.read_parquet(path, columns=["prompt", "chosen"])
        frame = frame[(frame["prompt"] + frame["chosen"]).str.len() < 4 * LONGEST // 3].head(count)
        return frame["prompt"].tolist(), frame["chosen"].tolist()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]

    def text(median):
        return " ".join(rng.choices(words, k=min(int(rng.lognormvariate(0, 0.7) * median) + 1, LONGEST // 8)))

    return [f"{text(12)}\n" for _ in range(count)], [text(24) for _ in range(count)]


def tokenizer(kind: str, corpus: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=4000,
        special_tokens=["<pad>", "</s>", "[CLS]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    single = "$A </s>"
    if kind == "encoder":
        special, single = {"pad_token": "<pad>", "cls_token": "[CLS]", "sep_token": "</s>"}, "[CLS] $A </s>"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("[CLS]", 2), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LONGEST, **special)


def save_model(kind: str, folder: Path, corpus: list[str]) -> None:
    torch.manual_seed(0)
    config = (LlamaConfig if kind == "causal" else BertConfig)(
        **SHAPE, vocab_size=4000, max_position_embeddings=LONGEST, num_labels=1, pad_token_id=0, initializer_range=0.1
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer(kind, corpus).save_pretrained(folder)


class Rivals:
    """Each returns raw scores [N] of whole texts, given a batch size."""

    def __init__(self, reward: ClassifierReward, folder: Path):
        self.model = reward.model
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.pipe = pipeline("text-classification", model=self.model, tokenizer=self.tokenizer, device=reward.device)
        self.by_name = {"pipeline": self.pipeline, "loop": self.loop, "sorted loop": self.sorted_loop}

    def pipeline(self, whole: list[str], size: int) -> torch.Tensor:
        return torch.tensor([out["score"] for out in self.pipe(whole, batch_size=size, function_to_apply="none")])

    def loop(self, whole: list[str], size: int) -> torch.Tensor:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(whole), size):
                batch = self.tokenizer(whole[start : start + size], padding=True, return_tensors="pt")
                parts.append(self.model(**batch.to(self.model.device)).logits[:, 0])
        return torch.cat(parts).float().cpu()

    def sorted_loop(self, whole: list[str], size: int) -> torch.Tensor:
        order = sorted(range(len(whole)), key=lambda i: -len(whole[i]))
        scores = torch.empty(len(whole))
        scores[order] = self.loop([whole[i] for i in order], size)
        return scores


def timed(function) -> tuple[dict[str, float], torch.Tensor]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def spread(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4)
    numbers = {"median": statistics.median(values), "q1": quarters[0], "q3": quarters[2], "min": min(values)}
    return {name: round(value, 4) for name, value in {**numbers, "max": max(values)}.items()}


def measure(kind: str, prompts: list[str], completions: list[str], args: argparse.Namespace) -> dict:
    """The whole measurement for one kind of model."""
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        save_model(kind, Path(folder), whole)
        reward = ClassifierReward(folder, normalize=False, device=args.device)
        rivals = Rivals(reward, Path(folder))
    # other work on the machine disturbs processor time less; a GPU's work is only in the wall clock
    clock = "cpu" if reward.device.type == "cpu" else "wall"
    batch = RewardBatch(prompts, completions)
    expected = reward.score(batch).scores  # also warms up
    best, sweep = {}, {}
    for name, function in rivals.by_name.items():
        taken = {}
        for size in tqdm(args.sizes, desc=f"{kind}: best batch size of the {name}"):
            runs = [timed(lambda function=function, size=size: function(whole, size)) for _ in range(2)]
            torch.testing.assert_close(runs[0][1], expected, rtol=0, atol=1e-3)
            taken[size] = round(min(duration[clock] for duration, _ in runs), 4)
        best[name], sweep[name] = min(taken, key=taken.get), taken
    sides = {"ours": lambda: reward.score(batch).scores}
    for name, function in rivals.by_name.items():
        sides[name] = lambda function=function, size=best[name]: function(whole, size)
    names, taken = list(sides), {name: [] for name in sides}
    for number in trange(args.repetitions, desc=f"{kind}: measuring"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            duration, scores = timed(sides[name])
            torch.testing.assert_close(scores, expected, rtol=0, atol=1e-3)
            taken[name].append(duration)
    lengths = [len(ids) for ids in reward.inputs(batch)]
    ratios = {
        f"ratio_{of}": {
            name: spread([theirs[of] / ours[of] for theirs, ours in zip(taken[name], taken["ours"], strict=True)])
            for name in rivals.by_name
        }
        for of in ("wall", "cpu")
    }
    return {
        **ratios,
        "sequences_per_second": {
            name: round(len(whole) / statistics.median(t["wall"] for t in values), 1) for name, values in taken.items()
        },
        "best_batch_size": best,
        "sweep_seconds": sweep,
        "seconds": {name: [round(t["wall"], 4) for t in values] for name, values in taken.items()},
        "tokens": {"total": sum(lengths), "median": statistics.median(lengths), "longest": max(lengths)},
        "batch_tokens": reward.batch_tokens,
        "parameters": sum(p.numel() for p in reward.model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--count", type=int, default=120, help="completions per pass")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of the rivals' batches")
    parser.add_argument("--texts", type=Path, help="parquet file with columns prompt and chosen")
    parser.add_argument("kind", choices=["causal", "encoder"])
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, help="default: results/score_throughput_<kind>.json")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    prompts, completions = texts(args.texts, args.count)
    report = {args.kind: measure(args.kind, prompts, completions, args)}
    report["workload"] = {
        "completions": len(prompts),
        "texts": args.texts.name if args.texts else "random words, log-normal lengths",
        "model": SHAPE,
        "dtype": "float32" if not torch.cuda.is_available() else "as saved",
    }
    report["versions"] = {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}}
    report["threads"] = torch.get_num_threads()
    output = args.output or RESULTS / f"score_throughput_{args.kind}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    for of in ("wall", "cpu"):
        for name, values in report[args.kind][f"ratio_{of}"].items():
            numbers = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
            print(f"{args.kind:8s} {of:5s} {name:12s} {numbers}")


if __name__ == "__main__":
    main()
