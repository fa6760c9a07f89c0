"""`align quickstart`, phase by phase."""

from contextlib import redirect_stdout
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
from align.quickstart.workspace import Workspace

# Seconds on two cores, for the estimate of the time left only.
EXPECTED = {
    "supervised fine-tuning": 20.0,
    "preference pairs": 18.0,
    "reward models": 40.0,
    "best-of-n": 25.0,
    **{f"ReMax: {name}": 45.0 for name in phases.RUNS},
    "report": 8.0,
}


def run_quickstart(folder: str | Path, settings: Settings, seed: int, console: Console) -> Path:
    """Run or continue the quickstart in `folder`; returns the path of the report."""
    import torch

    torch.set_num_threads(1)  # models this small gain nothing from a second thread and lose much on a busy machine
    space = Workspace(folder, settings.fingerprint(seed))
    steps = {
        "supervised fine-tuning": phases.sft,
        "preference pairs": phases.pairs,
        "reward models": phases.reward_models,
        "best-of-n": phases.best_of_n,
        **{f"ReMax: {name}": partial(phases.remax, name) for name in phases.RUNS},
    }
    log = space.folder / "quickstart.log"  # the trainers' metrics
    with PhaseProgress(EXPECTED, console) as progress:
        for name, function in steps.items():
            if space.finished(name):
                progress.skip(name)
                continue
            with progress.phase(name) as handle, log.open("a") as file, redirect_stdout(file):
                space.run(name, partial(function, space, settings, seed, handle))
        with progress.phase("report"):
            summary = summarise(space, settings, seed)
            report, _ = write_outputs(space.folder, summary, title=TITLE, intro=INTRO)
    print_summary(summary, [report, space.folder / "summary.json"])
    return report


def summarise(space: Workspace, settings: Settings, seed: int) -> dict:
    results = {name: phase["result"] for name, phase in space.state["phases"].items()}
    trained = results["reward models"]["members"]
    return build_summary(
        best_of_n=bon_curves(space, settings),
        runs={name: read_run(space.path("remax", name.replace(" ", "_"))) for name in phases.RUNS},
        phases=space.seconds,
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
        },
        reward_models=[
            {**member, "label_noise": settings.label_noise, "pairs": results["preference pairs"]["pairs"]}
            for member in trained
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


TITLE = "Quickstart: aligned with a learned reward, over-optimised, and then not"
INTRO = [
    "A small language model is fine-tuned on a toy world, reward models are trained on noisy preferences between its "
    "own answers, and the model is then optimised against them in two ways: by picking the best of n answers, and by "
    "ReMax. The gold reward, the toy world's true objective, is scored beside but never trained on.",
    "Watch where gold and proxy part: from there on the model is earning reward, not getting better.",
]
