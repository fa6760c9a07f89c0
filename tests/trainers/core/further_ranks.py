"""What `fsdp2_ranks` leaves out, with one global batch of 8: MODPO, DAPO with dynamic sampling, an ensemble of rewards,
constraints on PPO, the best model after an early stop. Run as a script on two processes: policy, folder."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from transformers import EarlyStoppingCallback

from align.data import toy
from align.distributed.shards import whole
from align.reward_models.ensemble import RewardEnsemble
from align.reward_models.rules import RuleReward
from align.trainers.dpo import DPOTrainer
from align.trainers.modpo import MODPOConfig, MODPOTrainer
from tests.trainers.accelerate_setups import under
from tests.trainers.core.fsdp2_ranks import settings
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import QUIET, on_policy, prompts, wanted_words
from tests.trainers.weighting.constrained_ranks import HELD, polite

RESUMED = {"modpo": "checkpoint-2", "constrained ppo": "checkpoint-3"}  # the latter inside a rollout
LEFT_OUT = ("time", "runtime", "per_second", "total_flos")  # the last counts padding


def wanted(completions, **columns) -> list[float]:
    """Often the same for a whole group, which dynamic sampling then replaces."""
    return [float(score > 0.3) for score in wanted_words(completions)]


def shortness(completions, **columns) -> list[float]:
    return [-len(text.split()) / 10 for text in completions]


def makers(policy: str, folder: Path) -> dict:
    def adapter():
        return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    def modpo():
        weights = {"pairs": 0.6, "wanted_words": 0.4}
        options = settings(tokens_per_batch=60, objective="pairs", weights=weights, output_dir=str(folder / "modpo"))
        args = MODPOConfig(**{**QUIET, "max_length": 32, "beta": 0.5, **options})
        return MODPOTrainer(policy, wanted_words, args, toy_pairs(24), toy_pairs(7, seed=1))

    def on_prompts(name, method, reward, peft_config=None, **options):
        given = settings(max_completion_length=12, **options)  # long enough that many are shorter
        kind, args = on_policy(method, folder / name, **given)
        data = prompts(24), prompts(5, seed=1)
        return kind(policy, reward, args, *data, gold_reward=toy.gold, peft_config=peft_config)

    def grpo():
        sampling = {"num_generations": 3, "dynamic_sampling_rounds": 2}
        loss = {"loss_type": "dapo", "scale_rewards": "batch", "tokens_per_batch": 120}
        return on_prompts("grpo", "grpo", wanted, **sampling, **loss)

    def rloo():
        reward = RewardEnsemble([RuleReward(f) for f in (wanted_words, polite, shortness)], "uwo", lambda_=0.5)
        kl = {"beta": 0.1, "kl_target": 0.05, "kl_horizon": 40}
        return on_prompts("rloo", "rloo", reward, adapter(), num_generations=3, **kl)

    def ppo():
        constraints = {"constraints": HELD, "multipliers": {"pid": {}}, "beta": 0.05}
        cut = {"num_mini_batches": 2, "num_iterations": 2, "max_steps": 6, "save_steps": 3, "tokens_per_batch": 90}
        return on_prompts("constrained ppo", "ppo", [polite, wanted_words], num_generations=2, **constraints, **cut)

    def best():
        kept = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 1}
        options = settings(max_steps=8, learning_rate=2.0, eval_steps=1, save_steps=1, logging_steps=3, **kept)
        trainer = DPOTrainer(
            policy, dpo_config(folder / "best", **options), toy_pairs(24), toy_pairs(7, seed=1), peft_config=adapter()
        )
        trainer.add_callback(EarlyStoppingCallback(1))
        return trainer

    made = {"modpo": modpo, "grpo": grpo, "rloo": rloo, "constrained ppo": ppo, "best": best}
    return {**made, **{f"{name} resumed": made[name] for name in RESUMED}}


def train(policy: str, folder: Path) -> dict[str, dict]:
    """All numbers that were logged, the trained weights and what is learned beside them, by case."""
    found = {}
    for name, make in makers(policy, folder).items():
        trainer = make()
        case = name.removesuffix(" resumed")
        trainer.train(None if case == name else folder / case / RESUMED[case])
        weights = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
        if case == "constrained ppo":
            weights |= {f"critic.{name}": p for name, p in trainer.critic.model.named_parameters()}
        found[name] = {
            "logs": [
                {key: value for key, value in entry.items() if not any(part in key for part in LEFT_OUT)}
                for entry in trainer.state.log_history
            ],
            "weights": {name: whole(p).clone() for name, p in weights.items()},
            "learned": trainer.weighting.state_dict() if case == "constrained ppo" else {},
            "best": Path(trainer.state.best_model_checkpoint or "").name,
        }
        if hasattr(trainer, "close"):
            trainer.close()
        trainer.accelerator.wait_for_everyone()
    return found


if __name__ == "__main__":
    policy, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    with under("fsdp2"):
        found = train(policy, folder)
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()
