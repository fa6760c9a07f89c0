"""What scoring with five reward models costs when they share a model, next to one model and to five.

    python benchmarks/ensemble_scoring.py [--part trunk|lora|memory ...] [--repetitions 9] [--output FILE]

trunk   Five members on a shared trunk (one upper layer of twelve each) against one model of the same size: the same
        completions through `ClassifierReward.score` and `RewardEnsemble.score`, tokenisation included.
lora    Five LoRA adapters in one call against five calls, one per member, less four times the measured tokenisation and
        padding. The rival is measured twice: one model per member with its adapter merged into the weights (nothing is
        left to compute but five plain forward passes), and PEFT on one model, its adapters switched by `set_adapter`.
memory  The trunk's five members against one model, in a fresh process each: bytes of the weights, and resident memory
        while scoring over that before loading.

A ratio is one repetition's time of ours over the rival's, both in processor time (which other work on the machine
disturbs less) and by the wall clock; the variants take turns within a repetition, in an order that rotates. The trunk's
ratio depends on the share of layers that members own, u of L: about 1 + 4 u/L in time, and 1 + 4 u/L times the layers'
share of the weights in memory; on more than one upper layer of twelve it would be above 1.5.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import trange

RESULT = Path(__file__).parent / "results" / "ensemble_scoring.json"
MEMBERS, UPPER = 5, 1
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 512,
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
BATCH_TOKENS = 2048


# ---- models and completions -----------------------------------------------------------------------------------------


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(SHAPE["vocab_size"] - 3))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def plain_model():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE, pad_token_id=0, eos_token_id=1, num_labels=1)).eval()


def write_models(folder: Path, parts: list[str]) -> None:
    """`one`: a model; `trunk`: five on a shared trunk; `lora`: five adapters on `one`."""
    from peft import LoraConfig

    from align.modeling.load import load_sequence_classifier
    from align.modeling.member_lora import adapter_parameters, add_member_adapters
    from align.modeling.members import share_trunk
    from align.reward_models.ensemble import save_ensemble
    from align.reward_models.joint import save_adapters, save_trunk

    names = [f"member_{i}" for i in range(MEMBERS)]
    if not (folder / "one").exists():
        plain_model().save_pretrained(folder / "one")
        tokenizer().save_pretrained(folder / "one")
    if "lora" in parts and not (folder / "lora").exists():
        config = LoraConfig(**LORA)
        model = add_member_adapters(load_sequence_classifier(folder / "one"), config, list(range(MEMBERS)))
        with torch.no_grad():  # as after training: B is not 0
            for p in adapter_parameters(model):
                p += 0.01 * torch.randn(p.shape)
        save_adapters(model, [folder / "lora" / name for name in names], config, tokenizer())
        save_ensemble(folder / "lora", names, kind="lora")
    if set(parts) & {"trunk", "memory"} and not (folder / "trunk").exists():
        save_trunk(share_trunk(plain_model(), list(range(MEMBERS)), UPPER), folder / "trunk")
        tokenizer().save_pretrained(folder / "trunk")
        for name in names:
            (folder / "trunk" / name).mkdir()
        save_ensemble(folder / "trunk", names, kind="shared_trunk", upper_layers=UPPER)


def completions(count: int, seed: int):
    from align.reward_models.base import RewardBatch

    rng = random.Random(seed)

    def text(low, high):
        return " ".join(f"w{rng.randrange(SHAPE['vocab_size'] - 3)}" for _ in range(rng.randint(low, high)))

    return RewardBatch([text(16, 64) + " " for _ in range(count)], [text(32, 128) for _ in range(count)])


# ---- what is timed --------------------------------------------------------------------------------------------------


def trunk_variants(folder: Path) -> dict:
    from align.reward_models.classifier import ClassifierReward
    from align.reward_models.ensemble import load_ensemble

    one = ClassifierReward(folder / "one", device="cpu", batch_tokens=BATCH_TOKENS)
    five = load_ensemble(folder / "trunk", "mean", normalize=False, device="cpu", batch_tokens=BATCH_TOKENS)
    return {"one": one.score, "ours": five.score}


def lora_variants(folder: Path) -> dict:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from align.data.batching import length_batches
    from align.data.collate import right_pad
    from align.reward_models.classifier import ClassifierReward
    from align.reward_models.ensemble import load_ensemble

    options = {"device": "cpu", "batch_tokens": BATCH_TOKENS, "normalize": False}
    members = [folder / "lora" / f"member_{i}" for i in range(MEMBERS)]
    five = load_ensemble(folder / "lora", "mean", **options)
    merged = [ClassifierReward(member, **options) for member in members]
    base = AutoModelForSequenceClassification.from_pretrained(folder / "one", num_labels=1)
    model = PeftModel.from_pretrained(base, members[0], adapter_name="member_0")
    for i in range(1, MEMBERS):
        model.load_adapter(members[i], adapter_name=f"member_{i}")
    switched = ClassifierReward(model.eval(), tokenizer=tokenizer(), **options)

    def five_merged(batch):
        return torch.stack([reward.score(batch).scores for reward in merged])

    def five_switched(batch):
        scores = []
        for i in range(MEMBERS):
            model.set_adapter(f"member_{i}")
            scores.append(switched.score(batch).scores)
        return torch.stack(scores)

    def tokenise_and_pad(batch):
        sequences = switched.inputs(batch)
        for rows in length_batches(list(map(len, sequences)), BATCH_TOKENS):
            right_pad([sequences[i] for i in rows], 0)

    def ours(batch):
        extras = five.score(batch).extras
        return torch.stack([extras[f"member/{i}"] for i in range(MEMBERS)])

    return {"ours": ours, "merged": five_merged, "switched": five_switched, "tokenise": tokenise_and_pad}


def timed(function, batch) -> tuple[dict[str, float], object]:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(batch)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def measure(variants: dict, repetitions: int, count: int) -> list[dict]:
    """Seconds of every repetition by variant and clock; the first two repetitions warm up."""
    measured, names = [], list(variants)
    for number in trange(-2, repetitions, desc="Measuring"):
        batch = completions(count, number)
        shift = number % len(names)
        seconds, results = {}, {}
        for name in names[shift:] + names[:shift]:
            seconds[name], results[name] = timed(variants[name], batch)
        for name in ("merged", "switched"):
            if name in results:
                torch.testing.assert_close(results["ours"], results[name], rtol=0, atol=2e-3)
        measured.append(seconds)
    return measured[2:]


# ---- memory ---------------------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def memory_of(variant: str, folder: Path) -> dict[str, int]:
    """In a fresh process: bytes of the weights, and of resident memory at its peak while scoring, over that before."""
    from align.reward_models.classifier import ClassifierReward
    from align.reward_models.ensemble import load_ensemble

    batch, options = completions(64, 0), {"device": "cpu", "batch_tokens": BATCH_TOKENS, "normalize": False}
    ClassifierReward(tiny(), tokenizer=tokenizer(), **options).score(batch)  # what libraries load at their first use
    before = resident("VmRSS")
    if variant == "one":
        reward = ClassifierReward(folder / "one", **options)
        model = reward.model
    else:
        reward = load_ensemble(folder / "trunk", "mean", **options)
        model = reward.members.classifier.model
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, without what loading needed
    reward.score(batch)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights": weights, "scoring": resident("VmHWM") - before}


def tiny():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {**SHAPE, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_labels": 1}
    return LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1))


def memory(folder: Path) -> dict:
    found = {}
    for variant in ("one", "trunk"):
        command = [sys.executable, __file__, "--memory_of", variant, "--models", str(folder)]
        found[variant] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratios = {f"ratio_{key}": round(found["trunk"][key] / found["one"][key], 4) for key in found["one"]}
    return {**ratios, "bytes": found}


# ---- report ---------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4)
    numbers = {"median": statistics.median(values), "q1": quarters[0], "q3": quarters[2], "min": min(values)}
    return {name: round(value, 4) for name, value in {**numbers, "max": max(values)}.items()}


def report(part: str, measured: list[dict]) -> dict:
    rivals = {"trunk": ["one"], "lora": ["merged", "switched"]}[part]
    ratios = {}
    for clock in ("cpu", "wall"):
        for rival in rivals:
            shared = [(MEMBERS - 1) * m["tokenise"][clock] if part == "lora" else 0.0 for m in measured]
            values = [m["ours"][clock] / (m[rival][clock] - s) for m, s in zip(measured, shared, strict=True)]
            ratios[f"ratio_{clock}_to_{rival}"] = spread(values)
    seconds = {name: [round(m[name]["cpu"], 4) for m in measured] for name in measured[0]}
    return {**ratios, "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["trunk", "lora", "memory"], choices=["trunk", "lora", "memory"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--completions", type=int, help="per call [8; lora: 4]")
    parser.add_argument("--output", type=Path, default=RESULT, help="parts that are not measured stay as they are")
    parser.add_argument("--memory_of", choices=["one", "trunk"], help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help="keep the models here, or take them from here [a temporary folder]")
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of, args.models)))
        return

    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.models or Path(temporary)
        write_models(folder, args.part)
        for part, variants, count in (("trunk", trunk_variants, 8), ("lora", lora_variants, 4)):
            if part in args.part:
                count = args.completions or count
                measured = measure(variants(folder), args.repetitions, count)
                results[part] = {**report(part, measured), "completions_per_call": count}
        if "memory" in args.part:
            results["memory"] = memory(folder)
    results["workload"] = {
        "members": MEMBERS,
        "upper_layers": UPPER,
        "model": {**SHAPE, "dtype": "float32"},
        "lora": LORA,
        "batch_tokens": BATCH_TOKENS,
        "completions": "48 to 192 tokens with their prompts",
    }
    results["versions"] = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
    results["threads"] = torch.get_num_threads()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    for part in args.part:
        for name, values in results[part].items():
            if name.startswith("ratio"):
                print(f"{part:7s} {name:24s} {values}")


if __name__ == "__main__":
    main()
