"""Best-of-n against one reward model and against ensembles, on the toy world with 25 % wrong labels, over seeds.

    python benchmarks/ensemble_bon_toy.py [--seeds 0 1 2 3 4] [--folder DIR] [--output FILE] [--figure FILE]

Per seed, with the quickstart's phases: a policy from scratch, preference pairs of its answers with a quarter of the
labels flipped, five reward models that differ in head and data order, N answers to each prompt scored by all of them
and by the gold reward. The same answers are then chosen from by every rule; the expected gold score of the choice is
the unbiased estimate over all subsets of n. "one member" is the mean of the five curves that a single member gives.
Members are normalised on the evaluation pairs, as everywhere.

Intervals are 95 %: over seeds, Student's t of the seeds' means; over prompts, bootstrap of the prompts within each
seed. `difference` is the rule less one member, seed by seed: a seed's rules share policy, pairs and answers, so it is
paired. Every seed is written when it is done and kept; the results are of all seeds in FILE.

`--kinds lora shared_trunk` trains ensembles of these kinds too, from one pass over the same pairs, and lets them choose
from the same answers.
"""

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from align.evaluation.best_of_n import bon_curve
from align.evaluation.bootstrap import percentile_interval, resample_weights
from align.quickstart.settings import FULL

RESULT = Path(__file__).parent / "results" / "ensemble_bon_toy.json"
SETTINGS = replace(
    FULL,
    sft_rows_per_prompt=32,
    sft_learning_rate=5e-3,
    longest_text=8,
    pairs=2000,
    fondness=0.0,
    label_noise=0.25,
    own_pairs=False,
    reward_epochs=2,
    eval_prompts=128,
    max_completion_length=17,
    bon_n=1024,
    steps=60,  # there are no ReMax runs here; so they stand in the results
    eval_every=6,
)
"""Not the quickstart's: no annotators, fewer pairs with more wrong labels, all of them for every member; longer answers
from a policy that learned from shorter text."""
RULES = {
    "mean": {"rule": "mean"},
    "worst case": {"rule": "wco"},
    "uncertainty-weighted, lambda 0.5": {"rule": "uwo", "lambda_": 0.5},
    "lower confidence bound, lambda 1": {"rule": "lcb", "lambda_": 1.0},
}
KINDS = {
    "lora": {"learning_rate": 1e-2, "lora": {"r": 16, "target_modules": "all-linear"}},
    "shared_trunk": {"learning_rate": FULL.reward_learning_rate, "upper_layers": 1, "train_trunk": True},
}
ONE = "one member"
STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # quantiles of t, for 1 to 9 degrees


def run_seed(folder: Path, settings, seed: int, kinds: Sequence[str] = ()) -> dict:
    """Gold and proxy of the choice by rule: per n the mean over prompts, and per prompt the gold score."""
    import pandas as pd
    import torch
    from rich.console import Console

    from align.quickstart.progress import PhaseProgress
    from align.quickstart.run import make_plan
    from align.quickstart.workers import Phase
    from align.quickstart.workspace import Workspace

    torch.set_num_threads(1)
    space = Workspace(folder / f"seed_{seed}", settings.fingerprint(seed))
    plan = {name: phase for name, phase in make_plan(settings).items() if not name.startswith("ReMax")}
    plan |= {kind: Phase(partial(other_kind, kind), (), 20.0) for kind in kinds}
    with PhaseProgress({name: phase.expected for name, phase in plan.items()}, Console(stderr=True)) as progress:
        for name, phase in plan.items():
            if not space.finished(name):
                start = time.perf_counter()
                with progress.phase(name) as handle:
                    result = phase.function(space, settings, seed, handle)
                space.record(name, result, time.perf_counter() - start)
    results = {name: phase["result"] for name, phase in space.state["phases"].items()}
    table = pd.read_parquet(space.path("best_of_n", "answers.parquet"))
    accuracies = [results[f"reward model {i}"]["accuracy"] for i in range(settings.members)]
    found = {"accuracy": float(np.mean(accuracies)), **curves(table, settings)}
    for kind in kinds:
        scores = pd.read_parquet(space.path("best_of_n", f"{kind}.parquet"))
        of_kind = curves(table.assign(**{name: scores[name] for name in scores}), settings)
        found[kind] = {"accuracy": results[kind]["accuracy"], **of_kind}
    return found


def other_kind(kind: str, space, settings, seed: int, handle) -> dict:
    """Members of another kind on the pairs of the separate ones, and their scores of the same answers."""
    import pandas as pd
    from peft import LoraConfig

    import align
    from align.data import load_rows
    from align.reward_models.ensemble import load_ensemble

    options = dict(KINDS[kind])
    args = align.RewardConfig(
        output_dir=str(space.path(kind)),
        num_train_epochs=settings.reward_epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=options.pop("learning_rate"),
        lr_scheduler_type="linear",
        score_l2_coefficient=0.001,
        seed=seed * 100,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
    )
    if "lora" in options:
        options["peft_config"] = LoraConfig(**options.pop("lora"))
    evaluation = load_rows(space.path("data", "eval_pairs.jsonl"))
    folder = align.train_reward_ensemble(
        space.path("sft"),
        args,
        load_rows(space.path("data", "train_pairs_noisy.jsonl")),
        evaluation,
        members=settings.members,
        kind=kind,
        callbacks=[handle.callback(share=0.5)],
        **options,
    )
    members = load_ensemble(folder, "mean").members

    def scores(prompts, completions):
        return members.scores(align.RewardBatch(list(prompts), list(completions))).numpy()

    better, worse = (scores(evaluation["prompt"], evaluation[side]) for side in ("chosen", "rejected"))
    answers = pd.read_parquet(space.path("best_of_n", "answers.parquet"), columns=["prompt", "completion"])
    rows = scores(answers["prompt"], answers["completion"])
    frame = pd.DataFrame({f"member_{i}": row for i, row in enumerate(rows)})
    frame.to_parquet(space.path("best_of_n", f"{kind}.parquet"))
    return {"accuracy": float((better > worse).mean())}


def curves(frame, settings) -> dict:
    import torch

    from align.objectives.ensemble import aggregate

    members = torch.tensor(frame[[f"member_{i}" for i in range(settings.members)]].to_numpy().T)
    groups = [np.asarray(rows) for rows in frame.groupby("prompt_id", sort=True).indices.values()]
    gold = [frame["gold"].to_numpy()[rows] for rows in groups]

    def curve(scores):
        return bon_curve([scores.numpy()[rows] for rows in groups], gold)

    singles = [curve(member) for member in members]
    chosen = {name: curve(aggregate(members, **rule).scores) for name, rule in RULES.items()}
    chosen["the gold reward itself"] = curve(torch.tensor(frame["gold"].to_numpy()))
    per_prompt = {name: c.per_prompt["gold"] for name, c in chosen.items()}
    per_prompt[ONE] = np.mean([c.per_prompt["gold"] for c in singles], axis=0)
    proxy = {name: c.proxy.tolist() for name, c in chosen.items()}
    proxy[ONE] = np.mean([c.proxy for c in singles], axis=0).tolist()
    return {
        "n": singles[0].n.tolist(),
        "kl": singles[0].kl.tolist(),
        "gold": {name: values.mean(1).tolist() for name, values in per_prompt.items()},
        "gold_of_members": [c.gold.tolist() for c in singles],
        "proxy": proxy,
        "gold_per_prompt_at_largest_n": {name: values[-1].round(4).tolist() for name, values in per_prompt.items()},
        "variance": float(torch.var(members, dim=0, correction=0).mean()),
        "correlation": float(np.corrcoef(members.numpy())[np.triu_indices(settings.members, 1)].mean()),
    }


# ---- over seeds -----------------------------------------------------------------------------------------------------


def summarise(runs: list[dict]) -> dict:
    """At the largest n: mean over seeds by rule with both intervals, and the paired difference from one member."""
    factor = STUDENT_975[len(runs) - 2] / len(runs) ** 0.5
    found = {}
    for name in runs[0]["gold"]:
        gold = np.array([run["gold"][name] for run in runs])  # [seeds, n]
        less = gold - np.array([run["gold"][ONE] for run in runs])
        around = {key: interval(values, factor) for key, values in (("gold", gold), ("difference", less))}
        found[name] = {
            "gold": gold[:, -1].mean(),
            "over_seeds": around["gold"][-1],
            "over_prompts": over_prompts([run["gold_per_prompt_at_largest_n"][name] for run in runs]),
            "difference": less[:, -1].mean(),
            "difference_over_seeds": around["difference"][-1],
            "seeds_above_one_member": int((less[:, -1] > 0).sum()),
            "below_its_peak": (gold.max(1) - gold[:, -1]).mean(),
            "gold_by_n": gold.mean(0).tolist(),
            "over_seeds_by_n": around["gold"],
            "difference_over_seeds_by_n": around["difference"],
        }
    base = found[ONE]
    for values in found.values():
        values["above_one_member_without_overlap"] = {
            kind: bool(values[kind][0] > base[kind][1]) for kind in ("over_seeds", "over_prompts")
        }
    return rounded(found)


def interval(values: np.ndarray, factor: float) -> list[list[float]]:
    """[low, high] of the mean over seeds, per n. values: [seeds, n]."""
    half = factor * values.std(0, ddof=1)
    return np.stack([values.mean(0) - half, values.mean(0) + half], axis=1).tolist()


def over_prompts(values: list[list[float]]) -> list[float]:
    """Percentile bootstrap of the mean over seeds of the means over prompts; prompts are drawn within their seed."""
    drawn = [resample_weights(len(v), seed=i) @ np.array(v) for i, v in enumerate(values)]
    low, high = percentile_interval(np.mean(drawn, axis=0))
    return [float(low), float(high)]


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(float(value), 4) if isinstance(value, (float, np.floating)) else value


def draw(seeds: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = list(seeds.values())
    n = np.array(runs[0]["n"])
    factor = STUDENT_975[len(runs) - 2] / len(runs) ** 0.5
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = [ONE, *RULES]
    for name, colour in zip(names, plt.cm.tab10.colors, strict=False):
        gold = np.array([run["gold"][name] for run in runs])
        difference = gold - np.array([run["gold"][ONE] for run in runs])
        for axis, values in ((left, gold), (right, difference)):
            half = factor * values.std(0, ddof=1)
            axis.plot(n, values.mean(0), color=colour, label=name)
            axis.fill_between(n, values.mean(0) - half, values.mean(0) + half, color=colour, alpha=0.12, linewidth=0)
    left.set(xscale="log", xlabel="n", ylabel="gold score of the choice", title="chosen by")
    right.set(xscale="log", xlabel="n", ylabel="gold score above one member's choice", title="paired, seed by seed")
    left.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=Path("runs/ensemble_bon"))
    parser.add_argument("--pairs", type=int, default=SETTINGS.pairs)
    parser.add_argument("--kinds", nargs="*", default=[], choices=list(KINDS))
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time [%(default)s]")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()

    settings = replace(SETTINGS, pairs=args.pairs)
    report = json.loads(args.output.read_text()) if args.output.exists() else {"seeds": {}}
    if report.get("settings", asdict(settings)) != asdict(settings):
        parser.error(f"{args.output} holds seeds with other settings: give another --output")
    report |= {"settings": asdict(settings), "versions": versions()}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        runs = {pool.submit(run_seed, args.folder, settings, seed, args.kinds): str(seed) for seed in args.seeds}
        for run in as_completed(runs):
            found = {**report["seeds"], runs[run]: rounded(run.result())}
            report["seeds"] = {seed: found[seed] for seed in sorted(found, key=int)}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    if len(report["seeds"]) < 2:
        parser.exit(message=f"{args.output} holds one seed; intervals need two\n")
    report["at_largest_n"] = summarise(list(report["seeds"].values()))
    for kind in args.kinds:
        report[f"at_largest_n_{kind}"] = summarise([run[kind] for run in report["seeds"].values()])
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    for name, values in report["at_largest_n"].items():
        print(f"{name:34s} {values['gold']:6.3f}  seeds {values['over_seeds']}  prompts {values['over_prompts']}  "
              f"difference {values['difference']:+.3f} {values['difference_over_seeds']}")  # fmt: skip
    if args.figure:
        draw(report["seeds"], args.figure)


if __name__ == "__main__":
    main()
