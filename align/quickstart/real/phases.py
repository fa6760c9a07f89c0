"""The phases on a real chat model. Each reads files of the earlier ones, writes its own, and returns what the report
shows."""

import math
from pathlib import Path
from typing import Any

import align
from align.quickstart.parts import (
    accuracy,
    quiet,
    read_rows,
    remax_run,
    scored_answers,
    train_member,
    write_rows,
)
from align.quickstart.progress import PhaseHandle
from align.quickstart.real.settings import RealSettings
from align.quickstart.workspace import Workspace


def policy_of(space: Workspace, settings: RealSettings) -> str:
    """The chat model's folder or hub name."""
    return settings.model or str(space.path("model"))


def gold_of(space: Workspace, settings: RealSettings) -> Any:
    """The gold reward: the one that was given, or the reward model of pairs of its own."""
    from align.evaluation.scoring import reward_specs

    if not settings.gold:
        return {"type": "classifier", "path": str(space.path("gold", "model")), "name": "gold"}
    (found,) = reward_specs(settings.gold)
    return found


def model(space: Workspace, settings: RealSettings, seed: int, handle: PhaseHandle) -> dict:
    """SmolLM2-135M-Instruct, from its package."""
    from align.quickstart.real.model import make

    make(space.path("model"))
    return {}


def data(space: Workspace, settings: RealSettings, seed: int, handle: PhaseHandle) -> dict:
    """The pairs, shared out; and the lowest layers of the chat model, on which reward models are trained."""
    from align.modeling.load import load_tokenizer
    from align.modeling.lowest_layers import save_lowest_layers
    from align.quickstart.real.data import prompts_of, read_pairs, share_out

    policy = policy_of(space, settings)
    tokenizer = load_tokenizer(policy)
    pairs = read_pairs(settings, tokenizer)
    shares = share_out(pairs, settings, seed)
    for name, rows in shares.items():
        write_rows(space.path("data", f"{name}_pairs.jsonl"), rows)
    prompts = prompts_of(shares, settings)
    for name, rows in prompts.items():
        write_rows(space.path("data", f"{name}_prompts.jsonl"), rows)
    for name, layers in (("base", settings.layers), ("gold_base", settings.gold_layers)):
        if name == "base" or shares["gold"]:
            save_lowest_layers(policy, layers, space.path(name))
    return {"usable pairs": len(pairs), **{name: len(rows) for name, rows in shares.items()}}


def _reward_config(folder: Path, epochs: int, settings: RealSettings, seed: int) -> "align.RewardConfig":
    return align.RewardConfig(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=settings.reward_batch_size,
        per_device_eval_batch_size=16,
        learning_rate=settings.reward_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=4,
        max_length=settings.max_pair_prompt + settings.max_answer_length,
        seed=seed,
        **quiet(),
    )


def gold(space: Workspace, settings: RealSettings, seed: int, handle: PhaseHandle) -> dict:
    """The gold reward model: larger than the proxies, from more pairs, none of which they see."""
    rows = read_rows(space.path("data", "gold_pairs.jsonl"))
    args = _reward_config(space.path("gold", "model"), settings.gold_epochs, settings, seed)
    trainer = align.RewardTrainer(str(space.path("gold_base")), args, rows, callbacks=[handle.callback()])
    trainer.train()
    trainer.save_model()
    held_out = read_rows(space.path("data", "held_out_pairs.jsonl"))
    return _row("gold", accuracy(space.path("gold", "model"), held_out), len(held_out), len(rows), settings.gold_layers)


def reward_model(index: int, space: Workspace, settings: RealSettings, seed: int, handle: PhaseHandle) -> dict:
    """A member of the ensemble, from pairs of its own."""
    rows = read_rows(space.path("data", f"member_{index}_pairs.jsonl"))
    held_out = read_rows(space.path("data", "held_out_pairs.jsonl"))
    args = _reward_config(space.path("reward_models"), settings.reward_epochs, settings, seed * 100)
    found = train_member(index, space.path("base"), args, rows, held_out, settings.members, handle)
    return _row(found["name"], found["accuracy"], len(held_out), len(rows), settings.layers)


def _row(name: str, share: float, held_out: int, pairs: int, layers: int) -> dict:
    """What the page shows of a reward model, its accuracy with the 95 % interval over the held-out pairs."""
    low, high = wilson_interval(share, held_out)
    interval = f"{100 * low:.0f} to {100 * high:.0f} %"
    return {"name": name, "accuracy": share, "95 % interval": interval, "pairs": pairs, "layers": layers}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `count` (Wilson 1927), within [0, 1]."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def best_of_n(space: Workspace, settings: RealSettings, seed: int, handle: PhaseHandle) -> dict:
    return scored_answers(policy_of(space, settings), gold_of(space, settings), space, settings, seed)


def remax(name: str, space: Workspace, settings: RealSettings, seed: int, handle: PhaseHandle) -> dict:
    """A LoRA adapter on the chat model; the reference is the chat model itself."""
    from peft import LoraConfig

    peft_config = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")
    return remax_run(
        name,
        policy_of(space, settings),
        gold_of(space, settings),
        space,
        settings,
        seed,
        handle,
        peft_config=peft_config,
        per_device_eval_batch_size=8,
    )
