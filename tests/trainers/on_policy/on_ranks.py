"""SFT, ReMax and PPO with one global batch of 8, on one process or two. Run as a script: policy, folder, back-end."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.trainers.remax import ReMaxTrainer
from align.trainers.sft import SFTTrainer
from tests.trainers.tiny_runs import (
    demonstrations,
    on_policy,
    parameters,
    prompts,
    remax_config,
    sft_config,
    wanted_words,
)

GOLD = "align.data.toy:gold"
CHECKPOINTS = {"remax": "checkpoint-2", "ppo": "checkpoint-3"}  # PPO's is inside a rollout
KEYS = (
    *("loss", "grad_norm", "eval_loss", "eval_kl", "eval_gold", "reward", "kl", "entropy", "completions/mean_length"),
    *("clip_ratio", "critic/loss", "critic/grad_norm", "critic/explained_variance/task"),
)


def wanted_words_of_some(completions) -> list[float | None]:
    """No score for a part of the answers, which then are in no loss, mean or baseline of either process."""
    scores = zip(completions, wanted_words(completions), strict=True)
    return [None if text[:1] in "abcdefghim" else score for text, score in scores]


def makers(policy: str, folder: Path, world: int, backend: str = "transformers") -> dict:
    """A function that makes the trainer, by method. 24 rows: three steps per epoch; 7 rows and 5 prompts to evaluate
    on, which two processes cannot share evenly."""
    options = {
        "per_device_train_batch_size": 4 // world,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def sft():
        return SFTTrainer(policy, sft_config(folder / "sft", **options), demonstrations(24), demonstrations(7, seed=1))

    def remax():
        # a seed whose draws are not so near to a boundary that rounding decides on a token
        args = remax_config(folder / "remax", num_generations=2, rollout=backend, seed=1, **options)
        data = prompts(24), prompts(5, seed=1)
        return ReMaxTrainer(policy, wanted_words_of_some, args, *data, gold_reward=GOLD)

    def ppo():
        several = {"num_mini_batches": 2, "num_iterations": 2, "num_generations": 2, "max_steps": 8, "save_steps": 3}
        # two or three of four completions are cut, and left out
        args = {**options, **several, "truncated": "mask", "max_completion_length": 24}
        trainer_class, args = on_policy("ppo", folder / "ppo", **args)
        return trainer_class(policy, wanted_words, args, prompts(24), prompts(5, seed=1), gold_reward=GOLD)

    resumed = {"remax resumed": remax, "ppo resumed": ppo}
    return {"sft": sft, "remax": remax, "ppo": ppo, **resumed}


def train(policy: str, folder: Path, world: int, backend: str = "transformers") -> dict[str, dict]:
    """What was logged, the evaluation file's records and the final weights, by method."""
    found = {}
    for name, make in makers(policy, folder, world, backend).items():
        trainer = make()
        method, *resumed = name.split()
        trainer.train(folder / method / CHECKPOINTS[method] if resumed else None)
        logs = trainer.state.log_history
        weights = parameters(trainer.model)
        if method == "ppo":
            critic = parameters(trainer.accelerator.unwrap_model(trainer.critic.model))
            weights |= {f"critic.{name}": weight for name, weight in critic.items()}
        found[name] = {
            "logs": {key: [entry[key] for entry in logs if key in entry] for key in KEYS},
            "weights": weights,
        }
        if name != "sft":
            trainer.close()
            trainer.accelerator.wait_for_everyone()
            lines = (folder / method / "overoptimization.jsonl").read_text().splitlines()
            found[name]["evaluations"] = [json.loads(line) for line in lines[1:]]
    return found


if __name__ == "__main__":
    policy, folder, backend = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    found = train(policy, folder, 2, backend)
    rank = dist.get_rank()
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
