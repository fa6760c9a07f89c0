"""DPO and SRPO on offline pairs, online pairs, and MetaAPO's mixture of both: gold beside the proxy on the toy world.

    python benchmarks/offline_and_online_toy.py [--seeds 0 1 2] [--methods ...] [--folder FOLDER] [--output FILE]

For every seed a policy is trained from scratch on the reference text. Of 1,000 pairs of its own answers, which the gold
reward labels, a quarter has the wrong label; a reward model learns from these pairs, and is the proxy that ranks what
is written online. From the one policy start, with the same pairs, prompts, optimiser, beta, batch and number of steps:

    dpo         the pairs alone
    srpo        the pairs alone
    online_dpo  the prompts alone, four answers each
    metaapo     both, in rollouts of four steps

Measured on 128 other prompts, four sampled answers each: the mean gold score and the proxy's, every eight steps (of
dpo and srpo at the end); how many answers were drawn and scored in training; and of the start, dpo and srpo the gold
score after one, two and three revisions. A seed takes a minute or two of one core.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset

import align
from align.data import toy
from align.data.noise import flip_labels
from align.evaluation.answers import Drawing, generate_answers
from align.modeling.load import load_tokenizer
from benchmarks.sparsepo_masks import QUIET, sampled_pairs, start_policy

RESULT = Path(__file__).parent / "results" / "offline_and_online_toy.json"
STEPS, BATCH, PAIRS, FLIPPED, ANSWERS = 64, 32, 1000, 0.25, 4
COMMON = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 5e-4, "beta": 0.1, "adam_beta1": 0.0,
    "lr_scheduler_type": "constant", **QUIET,
}  # fmt: skip
ONLINE = {
    "num_generations": ANSWERS, "max_prompt_length": 16, "max_completion_length": 16, "rollout": "transformers",
    "missing_eos_penalty": 1.0, "eval_strategy": "steps", "eval_steps": 8, "num_eval_prompts": 128,
    "eval_num_generations": 4,
}  # fmt: skip
METHODS: dict[str, tuple[str, dict]] = {
    "start": ("", {}),
    "dpo": ("DPO", {}),
    "srpo": ("SRPO", {}),
    "online_dpo": ("OnlineDPO", {}),
    "metaapo": ("MetaAPO", {"meta_every": 4, "num_mini_batches": 4}),
}


def make_proxy(policy: str, pairs: Dataset, seed: int, folder: Path) -> None:
    args = align.RewardConfig(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=32, learning_rate=2e-3,
        lr_scheduler_type="linear", max_length=32, seed=seed, score_l2_coefficient=0.001, **QUIET,
    )  # fmt: skip
    trainer = align.RewardTrainer(policy, args, pairs)
    trainer.train()
    trainer.save_model()


def curve(folder: Path) -> list[dict]:
    """Mean gold and proxy of the evaluations that a run wrote."""
    found = [json.loads(line) for line in (folder / "overoptimization.jsonl").read_text().splitlines()[1:]]
    mean = {name: lambda record, name=name: sum(record["per_prompt"][name]) / 128 for name in ("gold", "proxy", "kl")}
    return [{"step": record["step"], **{name: round(of(record), 3) for name, of in mean.items()}} for record in found]


def measured(policy: str, proxy: dict, prompts: Dataset, folder: Path) -> dict:
    """The same of a policy in a folder, by an online trainer that makes no step."""
    args = align.OnlineDPOConfig(output_dir=str(folder), **{**COMMON, **ONLINE, "eval_strategy": "no"})
    trainer = align.OnlineDPOTrainer(policy, proxy, args, prompts, prompts, gold_reward=toy.gold)
    found = trainer.evaluate()
    trainer.close()
    return {name: round(found[f"eval_{name}"], 3) for name in ("gold", "proxy")}


def revised(policy: str, prompts: Dataset, seed: int, file: Path) -> list[float]:
    """Mean gold of the answers, and of what becomes of them in three revisions."""
    drawing = Drawing(n=4, max_completion_length=16, backend="transformers", seed=seed, revisions=3)
    lines = [json.loads(line) for line in generate_answers(policy, prompts, file, drawing).read_text().splitlines()]
    found = [
        [toy.gold_score(line["topic"], answer) for answer in (*line["earlier"], line["completion"])] for line in lines
    ]
    return [round(sum(column) / len(column), 3) for column in zip(*found, strict=True)]


def make_world(seed: int, folder: Path) -> None:
    """The policy, the pairs and the proxy, once."""
    if (folder / "proxy").exists():
        return
    train_prompts, eval_prompts = toy.split_prompts(seed, 256, 128)
    topics = {row["prompt"]: row["topic"] for row in train_prompts}
    policy = start_policy(seed, folder / "policy")
    pairs = flip_labels(sampled_pairs(policy, train_prompts, PAIRS, seed), FLIPPED, seed)[0]
    pairs = pairs.add_column("topic", [topics[prompt] for prompt in pairs["prompt"]])
    pairs.to_json(folder / "pairs.jsonl")
    Dataset.from_list(eval_prompts).to_json(folder / "eval_prompts.jsonl")
    make_proxy(policy, pairs, seed, folder / "proxy")


def train(name: str, seed: int, folder: Path) -> dict:
    """One run, and what is measured of it."""
    policy, pairs = str(folder / "policy"), align.load_rows(folder / "pairs.jsonl")
    held_out = align.load_rows(folder / "eval_prompts.jsonl")
    proxy = {"type": "classifier", "path": str(folder / "proxy"), "name": "proxy"}
    if name == "start":
        return {"revisions": revised(policy, held_out, seed, folder / "start.jsonl")}
    method, options = METHODS[name]
    config, cls = getattr(align, f"{method}Config"), getattr(align, f"{method}Trainer")
    output = folder / name
    if name in ("dpo", "srpo"):
        args = config(output_dir=str(output), max_length=32, seed=seed, **COMMON, **options)
        trainer = cls(policy, args, pairs, processing_class=load_tokenizer(policy))
        trainer.train()
        trainer.save_model()
        found = {"curve": [measured(str(output), proxy, held_out, folder / "look")], "drawn": 0}
        return {**found, "revisions": revised(str(output), held_out, seed, folder / f"{name}.jsonl")}
    args = config(output_dir=str(output), seed=seed, **COMMON, **ONLINE, **options)
    trainer = cls(policy, proxy, args, pairs, held_out, gold_reward=toy.gold)
    drawn, draw = [], trainer.pipeline.draw
    trainer.pipeline.draw = lambda asked, *rest: drawn.append(len(asked)) or draw(asked, *rest)
    trainer.train()
    trainer.close()
    found = {"curve": curve(output), "drawn": ANSWERS * sum(drawn)}
    for key in ("meta/drawn", "meta/weight", "offline/accuracies"):
        values = [log[key] for log in trainer.state.log_history if key in log]
        if values:
            found[key] = [round(values[0], 3), round(values[-1], 3)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", type=Path, help="keep what is made here, and go on from it [a temporary one]")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        for seed in args.seeds:
            make_world(seed, root / str(seed))
            for name in args.methods:
                found = root / str(seed) / f"{name}.json"
                if not found.exists():
                    found.write_text(json.dumps(train(name, seed, root / str(seed))))
                print(seed, name, found.read_text(), flush=True)
        runs = [
            {"seed": seed, **{f.stem: json.loads(f.read_text()) for f in sorted((root / str(seed)).glob("*.json"))}}
            for seed in args.seeds
        ]
    content = {"steps": STEPS, "batch": BATCH, "pairs": PAIRS, "flipped": FLIPPED, "answers": ANSWERS, "runs": runs}
    content["versions"] = {name: version(name) for name in ("torch", "transformers")}
    args.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
