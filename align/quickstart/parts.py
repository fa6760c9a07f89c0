"""What the phases of every quickstart are made of: members of an ensemble, scored answers, ReMax runs, curves."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import align
from align.evaluation.best_of_n import BonCurve, bon_curve
from align.quickstart.progress import PhaseHandle
from align.quickstart.settings import Sizes
from align.quickstart.workspace import Workspace

if TYPE_CHECKING:
    from align import RewardConfig

RUNS: dict[str, dict] = {
    "single proxy": {"members": 1, "aggregation": "mean"},
    "worst case": {"aggregation": "wco"},
    "uncertainty-weighted": {"aggregation": "uwo"},
}


def read_rows(path: Path):
    from align.data import load_rows

    return load_rows(path)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def quiet(**options) -> dict:
    return {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1000, **options}


def accuracy(reward_model: Path, pairs) -> float:
    """The share of the pairs whose chosen answer the saved reward model scores higher."""
    reward = align.build_reward({"type": "classifier", "path": str(reward_model)})
    better, worse = (
        reward.score(align.RewardBatch(prompts=list(pairs["prompt"]), completions=list(pairs[side]))).scores
        for side in ("chosen", "rejected")
    )
    return (better > worse).float().mean().item()


def train_member(
    index: int, base: str | Path, args: "RewardConfig", rows, evaluation, members: int, handle: PhaseHandle
) -> dict:
    """Member `index` of the ensemble in `args.output_dir`, on top of `base`; its accuracy is on `evaluation`."""
    folder = align.train_reward_ensemble(
        base, args, rows, evaluation, members=members, member=index, callbacks=[handle.callback()]
    )
    found = accuracy(folder / f"member_{index}", evaluation)
    return {"name": f"member {index}", "accuracy": found, "pairs": len(rows)}


def ensemble_spec(space: Workspace, settings: Sizes, aggregation: str, members: int | None = None) -> dict:
    """The reward of a run: a saved ensemble, or its first member alone."""
    folder = space.path("reward_models")
    if members == 1:
        return {"type": "classifier", "path": str(folder / "member_0"), "name": "proxy"}
    spec = {"type": "ensemble", "path": str(folder), "aggregation": aggregation, "name": "proxy"}
    return {**spec, "lambda": settings.uncertainty_weight} if aggregation == "uwo" else spec


def scored_answers(policy: str | Path, gold: Any, space: Workspace, settings: Sizes, seed: int) -> dict:
    """`bon_n` answers per prompt, scored by every member and the gold reward: one table, from which all curves come."""
    from align.evaluation.scoring import sample_table

    def rewards(tokenizer) -> dict:
        members = {
            f"member_{i}": align.build_reward(
                {"type": "classifier", "path": str(space.path("reward_models", f"member_{i}")), "name": f"member_{i}"},
                tokenizer=tokenizer,
            )
            for i in range(settings.members)
        }
        return {**members, "gold": align.build_reward(gold, tokenizer=tokenizer)}

    path = sample_table(
        str(policy),
        str(space.path("data", "eval_prompts.jsonl")),
        rewards,
        space.path("best_of_n", "answers.parquet"),
        n=settings.bon_n,
        num_prompts=settings.bon_prompts,
        max_prompt_length=settings.max_prompt_length,
        max_completion_length=settings.max_completion_length,
        backend=settings.backend,
        seed=seed,
    )
    return {"answers": settings.bon_prompts * settings.bon_n, "table": path.name}


def remax_run(
    name: str,
    policy: str | Path,
    gold: Any,
    space: Workspace,
    settings: Sizes,
    seed: int,
    handle: PhaseHandle,
    *,
    peft_config=None,
    **options,
) -> dict:
    """One ReMax run against a proxy, the gold reward scored beside it. options: of ReMaxConfig, over those here."""
    from align.distributed.checkpoints import newest_whole

    folder = space.path("remax", name.replace(" ", "_"))
    kept = {"save_strategy": "steps", "save_steps": settings.eval_every, "save_total_limit": 1}
    args = align.ReMaxConfig(
        **{
            "output_dir": str(folder),
            "run_name": name,
            "max_steps": settings.steps,
            "per_device_train_batch_size": settings.prompts_per_step,
            "per_device_eval_batch_size": 128,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": "constant",
            "beta": settings.beta,
            "max_prompt_length": settings.max_prompt_length,
            "max_completion_length": settings.max_completion_length,
            "rollout": settings.backend,
            "eval_strategy": "steps",
            "eval_steps": settings.eval_every,
            "num_eval_prompts": settings.eval_prompts,
            "eval_num_generations": settings.eval_samples,
            "seed": seed,
            **quiet(**kept, save_only_model=False),
            **options,
        }
    )
    trainer = align.ReMaxTrainer(
        str(policy),
        ensemble_spec(space, settings, **RUNS[name]),
        args,
        read_rows(space.path("data", "train_prompts.jsonl")),
        read_rows(space.path("data", "eval_prompts.jsonl")),
        gold_reward=gold,
        peft_config=peft_config,
        callbacks=[handle.callback()],
    )
    try:
        trainer.train(resume_from_checkpoint=folder.exists() and newest_whole(folder) is not None)
        trainer.save_model()
    finally:
        trainer.close()
    return {"run": str(folder.relative_to(space.folder)), "steps": settings.steps}


def bon_curves(space: Workspace, settings: Sizes) -> dict[str, BonCurve]:
    """Best-of-n by the first member, by the ensembles, and by the gold reward itself."""
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
