"""Constrained training against fixed weights on the toy world: does gold fall where no threshold holds the rewards?

    python benchmarks/constrained_toy.py world --seed 0 --folder runs/constrained_toy        # 40 s on one core
    python benchmarks/constrained_toy.py train helpfulness --seed 0 --folder ...              # 20-40 s each
    python benchmarks/constrained_toy.py train courtesy | sum | fixed | fixed_kl | mu | xi --seed 0 --folder ...
    python benchmarks/constrained_toy.py report --folder runs/constrained_toy --output FILE --figure FILE
    python benchmarks/constrained_toy.py all --folder runs/constrained_toy                    # everything above

Per seed everything is new: the policy (supervised, from scratch), two reward models from its own answers, each labelled
by one gold objective with a share of wrong labels, and the thresholds: the proxy point (align.evaluation.proxy_points)
of three exploratory runs without constraints, one on each reward (half as long) and one on their sum. Then `fixed`
maximises the sum of the two with little KL penalty, `fixed_kl` with the one that the constrained runs have; `mu` holds
each reward at least at its threshold, `xi` at it, with the KL as the only task; all four with the same prompts, steps,
learning rate and optimiser. Gold is the sum of the toy world's three objectives, one of which (brevity) no reward model
knows.

`report` gives, per run and reward, the mean over the last quarter of the run, of the rollouts (training prompts: what
the multipliers see) and of the evaluations (other prompts), as a distance from the threshold in per cent of the
threshold; and gold at the start, its largest value, and its mean over the last quarter.
"""

import argparse
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT, FIGURE = ROOT / "benchmarks" / "results" / "constrained_toy.json", ROOT / "docs" / "images" / "constrained.png"
SEEDS = (0, 1, 2)
REWARDS = ("helpfulness", "courtesy")
PAIRS, FLIPPED = 3000, 0.1
STEPS, SINGLE_STEPS, EVAL_EVERY, PROMPTS = 64, 32, 4, 64
# Exploring: how the thresholds are found. Adam's momentum delays what a multiplier does: without it they settle.
EXPLORING = {"num_generations": 2, "learning_rate": 5e-4}
COMPARING = {"num_generations": 4, "learning_rate": 1e-3, "adam_beta1": 0.0}
BETA = {"single": 0.0, "sum": 0.01, "fixed": 0.01, "fixed_kl": 0.2, "constrained": 0.2}
PID = {"kp": 3.0, "ki": 0.3}
EXPLORATORY, COMPARED = (*REWARDS, "sum"), ("fixed", "fixed_kl", "mu", "xi")
RUNS = (*EXPLORATORY, *COMPARED)
LENGTHS = {"max_prompt_length": 12, "max_completion_length": 17}
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}


def rows(path: Path):
    from datasets import Dataset

    return Dataset.from_list(json.loads(path.read_text()))


def make_world(folder: Path, seed: int) -> None:
    """The policy and the two reward models."""
    import align
    from align.data import toy
    from align.quickstart.phases import make_policy

    folder.mkdir(parents=True)
    for name, part in zip(("train", "eval"), toy.split_prompts(seed, 256, 128), strict=True):
        (folder / f"{name}.json").write_text(json.dumps(part))
    from datasets import Dataset

    tokenizer = toy.tokenizer()
    text = Dataset.from_list(toy.reference_text(rows(folder / "train.json").to_list(), 32, seed))
    args = align.SFTConfig(
        output_dir=str(folder / "sft"), num_train_epochs=1, per_device_train_batch_size=32, learning_rate=5e-3,
        lr_scheduler_type="cosine", warmup_steps=5, max_length=29, seed=seed, logging_steps=1000, **QUIET,
    )  # fmt: skip
    policy = make_policy(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed)
    trainer = align.SFTTrainer(policy, args, text, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    for name, pairs in labelled_pairs(folder, seed).items():
        args = align.RewardConfig(
            output_dir=str(folder / "rewards" / name), num_train_epochs=2, per_device_train_batch_size=32,
            learning_rate=2e-3, lr_scheduler_type="linear", max_length=29, seed=seed, score_l2_coefficient=0.001,
            logging_steps=1000, **QUIET,
        )  # fmt: skip
        trainer = align.RewardTrainer(str(folder / "sft"), args, Dataset.from_list(pairs))
        trainer.train()
        trainer.save_model()


def labelled_pairs(folder: Path, seed: int) -> dict[str, list[dict]]:
    """Pairs of the policy's answers, labelled by each gold objective, a share of the labels wrong."""
    import align
    from align.data import tokenize_prompts, toy
    from align.modeling.load import load_policy, load_tokenizer

    model, tokenizer = load_policy(folder / "sft"), load_tokenizer(folder / "sft")
    engine = align.make_engine(model, tokenizer, max_model_len=29, seed=seed, backend="transformers")
    prompts = tokenize_prompts(rows(folder / "train.json"), tokenizer, max_prompt_length=12)
    drawn = [prompts[i] for i in random.Random(seed).choices(range(len(prompts)), k=4 * PAIRS)]
    sampling = [align.SamplingParams(max_tokens=17, n=2, seed=i) for i in range(len(drawn))]
    found: dict[str, list[dict]] = {name: [] for name in REWARDS}
    rng = random.Random(f"labels {seed}")
    for row, rollout in zip(drawn, engine.generate([row["prompt_ids"] for row in drawn], sampling), strict=True):
        answers = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in rollout.completions]
        for name in REWARDS:
            scores = [toy.OBJECTIVES[name](row["topic"], answer) for answer in answers]
            if all(answers) and scores[0] != scores[1] and len(found[name]) < PAIRS:
                better = int((scores[1] > scores[0]) != (rng.random() < FLIPPED))
                pair = {"chosen": answers[better], "rejected": answers[1 - better]}
                found[name].append({"prompt": row["prompt"], **pair})
    return found


def method_options(folder: Path, name: str) -> dict:
    """What tells the runs apart."""
    if name in REWARDS:
        return {"reward_weights": [float(name == reward) for reward in REWARDS], "beta": BETA["single"]}
    if name in BETA:
        return {"beta": BETA[name]}
    direction, form = {"mu": ("at_least", "sigmoid"), "xi": ("equal", "tanh")}[name]
    thresholds = proxy_point(folder)["point"]
    return {
        "beta": BETA["constrained"],
        "constraints": [{"reward": r, "direction": direction, "threshold": thresholds[r]} for r in REWARDS],
        "multipliers": {"form": form, "pid": PID},
    }


def proxy_point(folder: Path) -> dict:
    """The thresholds, from the three runs without constraints; computed once."""
    from align.evaluation.proxy_points import find_proxy_point
    from align.evaluation.records import read_run
    from align.evaluation.strict_json import write_json

    path = folder / "proxy_points.json"
    if not path.exists():
        write_json(path, find_proxy_point([read_run(folder / name) for name in EXPLORATORY]).as_dict())
    return json.loads(path.read_text())


def train(folder: Path, name: str, seed: int) -> None:
    import align

    args = align.RLOOConfig(
        output_dir=str(folder / name), run_name=name, max_steps=SINGLE_STEPS if name in REWARDS else STEPS,
        per_device_train_batch_size=PROMPTS, per_device_eval_batch_size=256,
        lr_scheduler_type="constant", eval_strategy="steps", eval_steps=EVAL_EVERY, eval_num_generations=4,
        rollout="transformers", seed=seed, logging_steps=1,
        **LENGTHS, **QUIET, **(EXPLORING if name in EXPLORATORY else COMPARING), **method_options(folder, name),
    )  # fmt: skip
    rewards = [{"type": "classifier", "path": str(folder / "rewards" / reward), "name": reward} for reward in REWARDS]
    trainer = align.RLOOTrainer(
        str(folder / "sft"), rewards, args, rows(folder / "train.json"), rows(folder / "eval.json"),
        gold_reward={"type": "rule", "function": "align.data.toy:gold", "name": "gold"},
    )  # fmt: skip
    trainer.train()
    kept = ("step", "constraints/", "rewards/")
    logged = [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in trainer.state.log_history]
    (folder / name / "rollouts.json").write_text(json.dumps([e for e in logged if len(e) > 1]))


# ---- what came out of it ---------------------------------------------------------------------------------------------


def measure(folder: Path, seeds) -> dict:
    from align.evaluation.records import read_run

    found: dict = {}
    for seed in seeds:
        here = folder / f"seed{seed}"
        point = proxy_point(here)
        entry: dict = {"proxy_point": point, "runs": {}}
        for name in COMPARED:
            run = read_run(here / name)
            late = run.step > 0.75 * STEPS
            rollouts = json.loads((here / name / "rollouts.json").read_text())
            numbers = {
                "gold": {
                    "start": run.gold[0], "peak": run.gold.max(), "peak_step": run.step[run.gold.argmax()],
                    "last_quarter": run.gold[late].mean(), "end": run.gold[-1],
                },
                "kl": {"last_quarter": run.kl[late].mean()},
                "rewards": {},
            }  # fmt: skip
            for reward in REWARDS:
                values, threshold = run.extras[f"rewards/{reward}"], point["point"][reward]
                away = (values[late] - threshold) / abs(threshold) * 100
                trained = [e[f"rewards/{reward}"] for e in rollouts if e["step"] > 0.75 * STEPS]
                trained = (sum(trained) / len(trained) - threshold) / abs(threshold) * 100
                numbers["rewards"][reward] = {
                    "threshold": threshold, "start": values[0], "last_quarter": values[late].mean(),
                    "percent_above_threshold": {"rollouts": trained, "evaluations": away.mean()},
                    "every_evaluation": away,
                    "holds": {
                        where: bool(mean >= -5 if name == "mu" else abs(mean) <= 5)
                        for where, mean in (("rollouts", trained), ("evaluations", away.mean()))
                    },
                }  # fmt: skip
            entry["runs"][name] = numbers
        found[str(seed)] = entry
    return found


def draw(folder: Path, seeds, path: Path) -> None:
    """A row per seed: each reward and its threshold, then gold, over the steps."""
    from matplotlib.figure import Figure

    from align.evaluation.plots import COLOURS, style
    from align.evaluation.records import read_run

    shown = {"fixed": "fixed weights", "fixed_kl": "fixed weights, β 0.2", "mu": "mu: at least", "xi": "xi: equal"}
    with style():
        figure = Figure(figsize=(11.5, 2.7 * len(seeds)))
        axes = figure.subplots(len(seeds), 3, squeeze=False, sharex=True)
        for line, seed in zip(axes, seeds, strict=True):
            here = folder / f"seed{seed}"
            point = proxy_point(here)["point"]
            runs = {name: read_run(here / name) for name in shown}
            for axis, what in zip(line, (*REWARDS, "gold"), strict=True):
                for colour, (name, run) in zip(
                    (COLOURS[1], COLOURS[4], COLOURS[0], COLOURS[2]), runs.items(), strict=True
                ):
                    values = run.gold if what == "gold" else run.extras[f"rewards/{what}"]
                    axis.plot(run.step, values, color=colour, label=shown[name])
                if what in point:
                    axis.axhline(point[what], color="#555555", linestyle="--", linewidth=1.2, label="threshold")
                axis.set_title(
                    {"gold": "gold (never trained on)"}.get(what, f"{what} proxy") if seed == seeds[0] else ""
                )
                axis.set_xlabel("step" if seed == seeds[-1] else "")
            line[0].set_ylabel(f"seed {seed}")
        axes[0][0].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=130)


def report(folder: Path, seeds, output: Path, figure: Path) -> None:
    from align.evaluation.strict_json import plain, write_json

    setup = {
        "steps": STEPS, "exploring": EXPLORING, "comparing": COMPARING,
        "prompts per step": PROMPTS,
        "evaluation": "128 prompts x 4 answers",
        "pairs": PAIRS,
        "wrong labels": FLIPPED, "beta": BETA, "pid": PID, "method": "RLOO",
    }  # fmt: skip
    found = measure(folder, seeds)
    write_json(output, plain({"setup": setup, "seeds": found}, "results"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw(folder, seeds, figure)
    for seed, entry in found.items():
        for name, numbers in entry["runs"].items():
            gold = numbers["gold"]
            print(
                f"seed {seed} {name:<12} gold {gold['start']:.2f} -> peak {gold['peak']:.2f} -> last quarter "
                f"{gold['last_quarter']:.2f}; KL {numbers['kl']['last_quarter']:.1f}; "
                + "; ".join(
                    f"{reward} {r['last_quarter']:.3f} (rollouts {r['percent_above_threshold']['rollouts']:+.1f} %, "
                    f"evaluations {r['percent_above_threshold']['evaluations']:+.1f} % of {r['threshold']:.3f})"
                    for reward, r in numbers["rewards"].items()
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("world", "train", "report", "all"))
    parser.add_argument("run", nargs="?", choices=RUNS, help="with train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of report and all")
    parser.add_argument("--folder", type=Path, default=Path("runs/constrained_toy"))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    here = args.folder / f"seed{args.seed}"
    if args.what == "world":
        make_world(here, args.seed)
    elif args.what == "train":
        train(here, args.run, args.seed)
    elif args.what == "report":
        report(args.folder, args.seeds, args.output, args.figure)
    else:
        for seed in args.seeds:
            for step in (["world"], *(["train", name] for name in RUNS)):
                command = [sys.executable, __file__, *step, "--seed", str(seed), "--folder", str(args.folder)]
                subprocess.run(command, check=True)
        report(args.folder, args.seeds, args.output, args.figure)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
