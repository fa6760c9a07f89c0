"""`align quickstart`, phase by phase."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from align.evaluation.console import print_summary
from align.evaluation.records import read_run
from align.evaluation.report import write_outputs
from align.evaluation.summary import build_summary
from align.quickstart import phases
from align.quickstart.parts import RUNS, bon_curves
from align.quickstart.progress import PhaseProgress
from align.quickstart.settings import Settings, Sizes
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
    for name, reward in RUNS.items():
        needs = members[: reward.get("members", settings.members)]
        plan[f"ReMax: {name}"] = Phase(partial(phases.remax, name), tuple(needs), 35.0)
    return plan


def run_quickstart(folder: str | Path, settings: Settings, seed: int, console: Console) -> Path:
    """Run or continue the quickstart in `folder`; returns the path of the report."""
    space = Workspace(folder, settings.fingerprint(seed))
    summary = partial(summarise, space, settings, seed)
    return run_plan(make_plan(settings), space, (settings, seed), summary, console, title=TITLE, intro=INTRO)


def run_plan(
    plan: dict[str, Phase],
    space: Workspace,
    arguments: tuple[Sizes, int],
    summary: Callable[[], dict],
    console: Console,
    *,
    title: str,
    intro: list[str],
    threads: int = 1,
) -> Path:
    """Run what is not finished of the phases, called with `arguments` (settings, seed), and write the report of
    `summary()`, which is called after them. threads: of torch in each phase."""
    log = space.folder / "quickstart.log"  # what trainers and engine print
    expected = {name: phase.expected for name, phase in plan.items()} | {REPORT: 5.0}
    with PhaseProgress(expected, console) as progress:
        run_phases(plan, space, arguments, progress, log, arguments[0].backend, threads)
        with progress.phase(REPORT):
            found = summary()
            report, _ = write_outputs(space.folder, found, title=title, intro=intro)
    print_summary(found, [report, space.folder / "summary.json"])
    return report


def summarise(space: Workspace, settings: Settings, seed: int) -> dict:
    results = {name: phase["result"] for name, phase in space.state["phases"].items()}
    return build_summary(
        best_of_n=bon_curves(space, settings),
        runs={name: read_run(space.path("remax", name.replace(" ", "_"))) for name in RUNS},
        phases={name: space.seconds[name] for name in make_plan(settings)},
        setup={
            "seed": seed,
            "policy": "Llama, 2 layers, width 64, from scratch",
            "SFT rows": results["supervised fine-tuning"]["rows"],
            "preference pairs": results["preference pairs"]["pairs"],
            "annotators": f"{settings.members}, each adds {settings.fondness:g} to gold for every use of a word: "
            + ", ".join(results["preference pairs"]["words"]),
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


TITLE = "Quickstart: learned rewards optimised, the true reward beside them"
INTRO = [
    "A small language model is fine-tuned on a toy world, reward models are trained on noisy preferences between its "
    "own answers, and the model is then optimised against them in two ways: by picking the best of n answers, and by "
    "ReMax. The preferences are those of annotators who judge by the true reward and are fond of a filler word each, a "
    "reward model learns from one of them, and the single proxy is the first reward model. The gold reward, the toy "
    "world's true objective, is scored beside but never trained on.",
    "Watch where gold and proxy part: from there on the model is earning reward, not getting better.",
]
