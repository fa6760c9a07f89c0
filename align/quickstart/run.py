"""`align quickstart`, phase by phase."""

from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from align.evaluation.best_of_n import bon_curve
from align.evaluation.console import print_summary
from align.evaluation.records import read_run
from align.evaluation.report import write_outputs
from align.evaluation.summary import build_summary
from align.quickstart import phases
from align.quickstart.progress import PhaseProgress
from align.quickstart.settings import Settings
from align.quickstart.workers import Phase, run_phases, side_by_side
from align.quickstart.workspace import Workspace

REPORT = "report"


def make_plan(settings: Settings) -> dict[str, Phase]:
    """The phases before the report, in the order in which they begin where several could."""
    members = [f"reward model {i}" for i in range(settings.members)]
    plan = {
        "supervised fine-tuning": Phase(phases.sft, (), 20.0),
        "preference pairs": Phase(phases.pairs, ("supervised fine-tuning",), 24.0),
        **{name: Phase(partial(phases.reward_model, i), ("preference pairs",), 6.0) for i, name in enumerate(members)},
        "best-of-n": Phase(phases.best_of_n, tuple(members), 15.0),
    }
    for name, reward in phases.RUNS.items():
        needs = members[: reward.get("members", settings.members)]
        plan[f"ReMax: {name}"] = Phase(partial(phases.remax, name), tuple(needs), 35.0)
    return plan


def run_quickstart(folder: str | Path, settings: Settings, seed: int, console: Console) -> Path:
    """Run or continue the quickstart in `folder`; returns the path of the report."""
    space = Workspace(folder, settings.fingerprint(seed))
    plan = make_plan(settings)
    log = space.folder / "quickstart.log"  # what trainers and engine print
    expected = {name: phase.expected for name, phase in plan.items()} | {REPORT: 8.0}
    with PhaseProgress(expected, console) as progress:
        run_phases(plan, space, (settings, seed), progress, log, settings.backend)
        with progress.phase(REPORT):
            summary = summarise(space, settings, seed)
            report, _ = write_outputs(space.folder, summary, title=TITLE, intro=INTRO)
    print_summary(summary, [report, space.folder / "summary.json"])
    return report


def summarise(space: Workspace, settings: Settings, seed: int) -> dict:
    results = {name: phase["result"] for name, phase in space.state["phases"].items()}
    return build_summary(
        best_of_n=bon_curves(space, settings),
        runs={name: read_run(space.path("remax", name.replace(" ", "_"))) for name in phases.RUNS},
        phases={name: space.seconds[name] for name in make_plan(settings)},
        setup={
            "seed": seed,
            "policy": "Llama, 2 layers, width 64, from scratch",
            "SFT rows": results["supervised fine-tuning"]["rows"],
            "preference pairs": results["preference pairs"]["pairs"],
            "flipped labels": results["preference pairs"]["flipped"],
            "reward models": settings.members,
            "uncertainty weight": settings.uncertainty_weight,
            "best-of-n": f"{settings.bon_prompts} prompts x {settings.bon_n} answers",
            "ReMax": f"{settings.steps} steps x {settings.prompts_per_step} prompts, lr {settings.learning_rate:g}, "
            f"beta {settings.beta:g}",
            "evaluation": f"{settings.eval_prompts} prompts x {settings.eval_samples} samples",
            "phases at once": side_by_side(),
        },
        reward_models=[
            {**results[f"reward model {i}"], "label_noise": settings.label_noise} for i in range(settings.members)
        ],
        seed=seed,
    )


def bon_curves(space: Workspace, settings: Settings) -> dict:
    """Best-of-n by the first member, by two ensembles, and by the gold reward itself."""
    import pandas as pd
    import torch

    from align.objectives.ensemble import aggregate

    table = pd.read_parquet(space.path("best_of_n", "answers.parquet"))
    members = torch.tensor(table[[f"member_{i}" for i in range(settings.members)]].to_numpy().T)
    selections = {
        "single proxy": members[0],
        "ensemble mean": aggregate(members, "mean").scores,
        "worst case": aggregate(members, "wco").scores,
        "uncertainty-weighted": aggregate(members, "uwo", lambda_=settings.uncertainty_weight).scores,
        "gold itself": torch.tensor(table["gold"].to_numpy()),
    }
    groups = [np.asarray(rows) for rows in table.groupby("prompt_id", sort=True).indices.values()]
    gold = [table["gold"].to_numpy()[rows] for rows in groups]
    return {
        name: bon_curve([scores.numpy()[rows] for rows in groups], gold, name=name, proxy_name=name)
        for name, scores in selections.items()
    }


TITLE = "Quickstart: learned rewards optimised, the true reward beside them"
INTRO = [
    "A small language model is fine-tuned on a toy world, reward models are trained on noisy preferences between its "
    "own answers, each on pairs that no other has seen, and the model is then optimised against them in two ways: by "
    "picking the best of n answers, and by ReMax. The gold reward, the toy world's true objective, is scored beside "
    "but never trained on.",
    "Watch where gold and proxy part: from there on the model is earning reward, not getting better.",
]
