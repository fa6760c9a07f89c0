"""What beta does to SparsePO's masks on the toy world: sparsity of both masks and KL per token, over seeds.

    python benchmarks/sparsepo_masks.py [--seeds 0 1 2] [--output FILE] [--figure FILE.png] [--tokens_figure FILE.png]

For every seed a policy is trained from scratch on the reference text, and pairs of its own answers are labelled by the
gold reward. From it starts one SparsePO run per beta (independent masks, all layers, three epochs); beta is the only
difference. The masks' learning rate is ten times the policy's: at the policy's own they stay far from 0 in three
epochs. Measured on held-out pairs after training:

    sparsity   share of exactly zero weights among the tokens of a completion, mean over both completions of all pairs
    token KL   KL(ref || policy) over the whole vocabulary in nats, sum over the completions' tokens / their number
"""

import argparse
import json
import random
import tempfile
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from datasets import Dataset

from align import SamplingParams, SFTConfig, SFTTrainer, SparsePOConfig, SparsePOTrainer, make_engine
from align.data import toy
from align.evaluation.masks import mask_figure
from align.modeling.load import load_policy, load_tokenizer
from align.quickstart.phases import make_policy

RESULT = Path(__file__).parent / "results" / "sparsepo_masks.json"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SHOWN = 3.2  # the beta whose masks are drawn token by token
BETAS = (0.05, 0.2, 0.8, 3.2)
SIDES = ("chosen", "rejected")
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 20}


def start_policy(seed: int, folder: Path) -> str:
    """A policy of two layers, trained on the reference text; its folder."""
    tokenizer = toy.tokenizer()
    (prompts,) = toy.split_prompts(seed, 256)
    args = SFTConfig(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=32, learning_rate=5e-3,
        lr_scheduler_type="cosine", warmup_steps=5, max_length=32, seed=seed, **QUIET,
    )  # fmt: skip
    policy = make_policy(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed)
    data = Dataset.from_list(toy.reference_text(prompts, 32, seed))
    trainer = SFTTrainer(policy, args, data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return str(folder)


def sampled_pairs(policy: str, prompts: list[dict], count: int, seed: int) -> Dataset:
    """Two answers of the policy per prompt, the one with the higher gold score chosen; ties are left out."""
    tokenizer = load_tokenizer(policy)
    engine = make_engine(load_policy(policy), tokenizer, backend="transformers", max_model_len=32, seed=seed)
    asked = random.Random(seed).choices(prompts, k=3 * count)
    rollouts = engine.generate(
        [tokenizer(row["prompt"])["input_ids"] for row in asked], SamplingParams(max_tokens=16, n=2)
    )
    engine.close()
    rows = []
    for row, rollout in zip(asked, rollouts, strict=True):
        answers = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in rollout.completions]
        worse, better = sorted(answers, key=lambda answer, topic=row["topic"]: toy.gold_score(topic, answer))
        scores = [toy.gold_score(row["topic"], answer) for answer in (worse, better)]
        if worse and better and scores[0] < scores[1]:
            rows.append({"prompt": row["prompt"], "chosen": better, "rejected": worse})
    return Dataset.from_list(rows[:count])


def train(policy: str, beta: float, seed: int, train_pairs: Dataset, eval_pairs: Dataset, folder: Path):
    """One run: what is measured before it and after it, and a picture of its masks."""
    args = SparsePOConfig(
        output_dir=str(folder), variant="independent", beta=beta, num_train_epochs=3, learning_rate=1e-3,
        mask_learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=0.1, per_device_train_batch_size=32,
        per_device_eval_batch_size=256, max_length=32, num_logged_pairs=2, seed=seed, **QUIET,
    )  # fmt: skip
    trainer = SparsePOTrainer(policy, args, train_pairs, eval_pairs, processing_class=toy.tokenizer())
    start = measured(trainer)
    steps = trainer.train().global_step
    end = measured(trainer)
    return {"seed": seed, "beta": beta, "steps": steps, **end, "at_start": start}, trainer.picture()


def measured(trainer: SparsePOTrainer) -> dict[str, float]:
    found, pairs = trainer.evaluate(), trainer.eval_dataset
    tokens = sum(len(ids) for side in SIDES for ids in pairs[f"{side}_ids"])

    def both(name: str) -> float:
        return sum(found[f"eval_{name}/{side}"] for side in SIDES)

    return {
        "token_kl": both("kl") * len(pairs) / tokens,
        "sparsity_u": both("mask_u_sparsity") / 2,
        "sparsity_d": both("mask_d_sparsity") / 2,
        "mean_u": both("mask_u_mean") / 2,
        "mean_d": both("mask_d_mean") / 2,
        "accuracy": found["eval_rewards/accuracies"],
    }


def seed_runs(seed: int, folder: Path) -> list[tuple[dict, dict]]:
    train_prompts, eval_prompts = toy.split_prompts(seed, 256, 128)
    policy = start_policy(seed, folder / "policy")
    train_pairs = sampled_pairs(policy, train_prompts, 2000, seed)
    eval_pairs = sampled_pairs(policy, eval_prompts, 300, seed + 1000)
    return [train(policy, beta, seed, train_pairs, eval_pairs, folder / "run") for beta in BETAS]


def claims(runs: list[dict]) -> dict:
    """In which seeds larger betas give divergence masks that are nowhere less sparse and sparser at the end, and ever
    less KL."""
    held: dict[str, list[int]] = {"sparser divergence masks": [], "less KL per token": []}
    for seed in sorted({run["seed"] for run in runs}):
        mine = sorted((run for run in runs if run["seed"] == seed), key=lambda run: run["beta"])
        zeros, kl = [run["sparsity_d"] for run in mine], [run["token_kl"] for run in mine]
        if all(a <= b for a, b in pairwise(zeros)) and zeros[0] < zeros[-1]:
            held["sparser divergence masks"].append(seed)
        if all(a > b for a, b in pairwise(kl)):
            held["less KL per token"].append(seed)
    return held


def draw(runs: list[dict], path: Path) -> None:
    from align.evaluation import plots

    with plots.style():
        figure, axes = plots.panels(2, above=0.32)
        series_of = (
            (
                axes[0, 0],
                "share of weights that are exactly 0",
                {"sparsity_d": "divergence mask", "sparsity_u": "reward mask"},
            ),
            (axes[0, 1], "KL per token (nats)", {"token_kl": "KL(ref || policy)"}),
        )
        for axis, title, series in series_of:
            for number, (key, label) in enumerate(series.items()):
                means = [sum(r[key] for r in runs if r["beta"] == b) / sum(r["beta"] == b for r in runs) for b in BETAS]
                axis.plot(BETAS, means, color=plots.COLOURS[number], marker=plots.MARKERS[number], label=label)
                axis.plot(
                    [r["beta"] for r in runs], [r[key] for r in runs], "x", color=plots.COLOURS[number], alpha=0.6
                )
            axis.set(xscale="log", xlabel="beta", xticks=BETAS, xticklabels=[f"{b:g}" for b in BETAS])
            axis.set_ylim(bottom=0)
            axis.minorticks_off()
            axis.set_title(title)
            axis.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="added to those of the output file")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--figure", type=Path, default=IMAGES / "sparsepo_beta.png")
    parser.add_argument("--tokens_figure", type=Path, default=IMAGES / "sparsepo_masks.png")
    args = parser.parse_args()
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found = seed_runs(seed, Path(folder))
        for run, picture in found:
            if seed == 0 and run["beta"] == SHOWN:
                mask_figure(picture).savefig(args.tokens_figure, dpi=130)
            shown = ", ".join(f"{key} {run[key]:.4g}" for key in ("sparsity_d", "sparsity_u", "token_kl", "accuracy"))
            print(f"seed {seed}, beta {run['beta']:g}: {shown}", flush=True)
        before = json.loads(args.output.read_text())["runs"] if args.output.exists() else []
        runs = [run for run in before if run["seed"] != seed] + [run for run, _ in found]
        result = {
            "claims held in seeds": claims(runs),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "runs": sorted(runs, key=lambda run: (run["seed"], run["beta"])),
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        draw(runs, args.figure)
        print(json.dumps(result["claims held in seeds"]), flush=True)


if __name__ == "__main__":
    main()
