"""Runs under DeepSpeed on two processes, or the same in one. Run as a script on two: policy, folder, setup."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.errors import AlignError
from align.reward_models.classifier import ClassifierReward
from align.trainers.modpo import MODPOConfig, MODPOTrainer
from align.trainers.sft import SFTTrainer
from tests.trainers import reward_runs, sparse_runs
from tests.trainers.accelerate_setups import OF_DEEPSPEED, under
from tests.trainers.core import fsdp2_ranks, further_ranks
from tests.trainers.core.fsdp2_ranks import KEYS, settings
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import QUIET, demonstrations, sft_config

CASES = ("sft", "dpo", "dpo, adapter", "reward", "sparsepo", "modpo", "remax", "best", "margins", "schedule")
RESUMED = {"dpo": "checkpoint-2", "schedule": "checkpoint-4"}
FROM = {"longer": "schedule/checkpoint-6", "rate": "schedule/checkpoint-4"}  # what goes on from another case
IN_BFLOAT16 = ("sparsepo, bf16", "reward, adapter, bf16")


def makers(policy: str, folder: Path) -> dict:
    in_bfloat16 = {"bf16": True, "eval_strategy": "no", "max_steps": 2, "save_strategy": "no"}

    def margins():
        """Of a reward model by its name."""
        options = settings(objective="pairs", weights={"pairs": 0.6, "rm": 0.4}, eval_strategy="no")
        args = MODPOConfig(**{**QUIET, "output_dir": str(folder / "margins"), "max_length": 32, "beta": 0.5, **options})
        reward = ClassifierReward(f"{policy}_reward", name="rm", policy_tokenizer=further_ranks.toy.tokenizer())
        return MODPOTrainer(policy, reward, args, toy_pairs(24))

    def schedule(**options):
        slope = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 6, "eval_strategy": "no"}
        args = sft_config(folder / "schedule", **settings(**{**slope, **options}))
        return SFTTrainer(policy, args, demonstrations(48))

    def sparse():
        options = settings(mask_dropout=0.0, **in_bfloat16)
        return sparse_runs.trainer(policy, folder / "sparsepo, bf16", **options)

    def reward():
        args = reward_runs.config(folder / "reward, adapter, bf16", **settings(**in_bfloat16))
        lora = fsdp2_ranks.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        tokenizer = further_ranks.toy.tokenizer()
        return fsdp2_ranks.RewardTrainer(policy, args, toy_pairs(24), None, tokenizer, peft_config=lora)

    def cached():
        args = dpo_config(folder / "cached", precompute_ref_log_probs=True, **settings(**in_bfloat16))
        return fsdp2_ranks.DPOTrainer(policy, args, toy_pairs(24))

    made = {**fsdp2_ranks.makers(policy, folder), **further_ranks.makers(policy, folder)}
    own = {
        "margins": margins,
        "schedule": schedule,
        "longer": lambda: schedule(max_steps=8, save_strategy="no"),
        "rate": lambda: schedule(learning_rate=1e-3, resume_changes=["learning_rate"], save_strategy="no"),
        "sparsepo, bf16": sparse,
        "reward, adapter, bf16": reward,
        "cached, bf16": cached,
    }
    return {**made, **own}


def train(policy: str, folder: Path, cases: list[str]) -> dict[str, dict]:
    """What was logged, by case, or why it was refused; the trained models are in folder/<case>/final."""
    made, found = makers(policy, folder), {}
    for name in cases:
        case = name.removesuffix(" resumed")
        try:
            trainer = made[case]()
            begun = FROM.get(case) if case == name else f"{case}/{RESUMED[case]}"
            trainer.train(folder / begun if begun else None)
        except AlignError as error:
            found[name] = {"refused": str(error)}
            continue
        logs = trainer.state.log_history
        found[name] = {key: [entry[key] for entry in logs if key in entry] for key in (*KEYS, "learning_rate")}
        trainer.save_model(str(folder / name / "final"))
        if hasattr(trainer, "close"):
            trainer.close()
        trainer.accelerator.wait_for_everyone()
    return found


def refusals(policy: str, folder: Path) -> dict[str, str]:
    """Of going on from a run of another model, and of a file of DeepSpeed's own that clips nothing."""

    def message(make) -> str:
        try:
            make()
        except AlignError as error:
            return str(error)
        return "not refused"

    def other_model():
        args = sft_config(folder / "sft", **settings(eval_strategy="no"))
        trainer = SFTTrainer(f"{policy}_other", args, demonstrations(24))
        trainer.train(str(folder / "sft" / "checkpoint-2"))

    def own_file():
        for name in set(os.environ) & OF_DEEPSPEED:
            del os.environ[name]
        path = folder / f"own{dist.get_rank()}.json"
        batch = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **batch}))
        SFTTrainer(
            policy, sft_config(folder / "own", deepspeed=str(path), **settings(eval_strategy="no")), demonstrations(24)
        )

    return {"other model": message(other_model), "own file": message(own_file)}


if __name__ == "__main__":
    policy, folder, setup = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo")
    with under(setup):
        found = train(
            policy,
            folder,
            [*CASES, *IN_BFLOAT16, *(f"{name} resumed" for name in RESUMED), *FROM, "cached, bf16", "ppo"],
        )
        found["refusals"] = refusals(policy, folder)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
