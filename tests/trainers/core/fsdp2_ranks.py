"""Trainers, unsharded in one process or under FSDP2 on two. Run as a script: policy, folder, names of `makers`."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig

from align.data import toy
from align.errors import ConfigError
from align.trainers.dpo import DPOTrainer
from align.trainers.kto import KTOConfig, KTOTrainer
from align.trainers.listwise_dpo import ListwiseDPOConfig, ListwiseDPOTrainer
from align.trainers.reward import RewardTrainer
from align.trainers.sft import SFTTrainer
from align.trainers.srpo import SRPOConfig, SRPOTrainer
from tests.trainers import reward_runs, sparse_runs
from tests.trainers.on_policy.talks import GuessingGame, questions, talking_tokenizer
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.test_listwise_dpo import rankings
from tests.trainers.tiny_runs import (
    QUIET,
    demonstrations,
    discriminator,
    on_policy,
    prompts,
    sft_config,
    tiny_model,
    wanted_words,
)

KEYS = (
    *(
        "loss",
        "grad_norm",
        "eval_loss",
        "eval_kl",
        "eval_gold",
        "reward",
        "kl",
        "rewards/margins",
        "mask_u/chosen/mean",
        "selective/excess_loss",
        "implicit/rewards",
        "discriminator/loss",
        "improver/loss",
        "meta/loss",
        "meta/drawn",
    ),
    *("critic/loss", "critic/grad_norm"),
)
RESUMED = {  # the last two inside a rollout
    "dpo": "checkpoint-2",
    "remax": "checkpoint-2",
    "ppo": "checkpoint-3",
    "metaapo": "checkpoint-3",
}


def settings(**options) -> dict:
    """A global batch of 8. The large epsilon keeps AdamW from making whole steps of rounding errors."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2,
        "max_steps": 4, "learning_rate": 5e-3, "adam_epsilon": 0.1, "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, **options,
    }  # fmt: skip


def kto_config(folder: Path, **options) -> KTOConfig:
    return KTOConfig(**{**QUIET, "output_dir": str(folder), "max_length": 32, **options})


def listwise_config(folder: Path, **options) -> ListwiseDPOConfig:
    return ListwiseDPOConfig(**{**QUIET, "output_dir": str(folder), "max_length": 40, **options})


def srpo_config(folder: Path, **options) -> SRPOConfig:
    return SRPOConfig(**{**QUIET, "output_dir": str(folder), "max_length": 24, **options})


def metaapo(policy: str, folder: Path):
    options = settings(num_mini_batches=2, meta_every=3, save_steps=3)  # saved inside a rollout
    trainer_class, args = on_policy("metaapo", folder, num_generations=2, **options)
    return trainer_class(policy, wanted_words, args, toy_pairs(24), prompts(6, seed=1), gold_reward=toy.gold)


def game(folder: Path, **options):
    tokenizer = talking_tokenizer()
    trainer_class, args = on_policy("grpo", folder, num_generations=4, max_completion_length=24, **options)
    return trainer_class(
        tiny_model(tokenizer), None, args, questions(24), None, tokenizer, environment_factory=GuessingGame
    )


def implicit(policy: str, folder: Path, **options):
    args = sft_config(folder, implicit_reward_beta=0.3, **settings(eval_strategy="no"))
    return SFTTrainer(policy, args, demonstrations(24), **options)


def not_sharded(trainer: DPOTrainer) -> DPOTrainer:
    """Other pairs have no log-probs of the reference, whose weights the main process alone has yet."""
    if trainer.accelerator.is_fsdp2:
        with pytest.raises(ConfigError, match="under FSDP2, none before training"):
            trainer.evaluate(toy_pairs(4, seed=2))
    return trainer


def without_padding(policy: str, folder: Path):
    """Five rows to evaluate, which two processes fill up to eight."""
    args = sft_config(folder, padding_free=True, **settings(max_length=None))
    return SFTTrainer(policy, args, demonstrations(24), demonstrations(5, seed=1))


def with_head(policy: str, folder: Path):
    """A head that accelerate splits by itself, and that TRL's loss does not call."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    args = sft_config(folder, **settings())
    return SFTTrainer(policy, args, demonstrations(24), demonstrations(5, seed=1), peft_config=adapter)


def makers(policy: str, folder: Path) -> dict:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    pairs, eval_pairs = toy_pairs(24), toy_pairs(8, seed=1)

    def on_prompts(method, **options):
        trainer_class, args = on_policy(method, folder / method, num_generations=2, **settings(**options))
        return trainer_class(policy, wanted_words, args, prompts(24), prompts(6, seed=1), gold_reward=toy.gold)

    def d2po():
        options = settings(eval_strategy="no", gold_labels=2, gold_label_every=1)
        trainer_class, args = on_policy("d2po", folder / "d2po", num_generations=2, **options)
        return trainer_class(policy, discriminator(toy.tokenizer()), args, prompts(24), None, gold_reward=wanted_words)

    def dpo(name, adapter=None, **options):
        args = dpo_config(folder / name, **settings(**options))
        return DPOTrainer(policy, args, pairs, eval_pairs, peft_config=adapter)

    made = {
        "sft": lambda: SFTTrainer(
            policy, sft_config(folder / "sft", **settings(eval_strategy="no")), demonstrations(24)
        ),
        "dpo": lambda: dpo("dpo"),
        "dpo, adapter": lambda: dpo("dpo, adapter", lora),
        "dpo, adapter, cached": lambda: not_sharded(dpo("dpo, adapter, cached", lora, precompute_ref_log_probs=True)),
        "sparsepo": lambda: sparse_runs.trainer(
            policy, folder / "sparsepo", **settings(mask_dropout=0.0, eval_strategy="no")
        ),
        "sft, without padding": lambda: without_padding(policy, folder / "sft, without padding"),
        "sft, head beside an adapter": lambda: with_head(policy, folder / "sft, head beside an adapter"),
        "half of it": lambda: SFTTrainer(
            policy,
            sft_config(folder / "half of it", half_finetuning=1, **settings(eval_strategy="no")),
            demonstrations(24),
        ),
        "selected tokens": lambda: SFTTrainer(
            policy,
            sft_config(folder / "selected tokens", selective_tokens=0.5, **settings(eval_strategy="no")),
            demonstrations(24),
            ref_model=tiny_model(toy.tokenizer(), seed=1),
        ),
        "implicit rewards": lambda: implicit(policy, folder / "implicit rewards"),
        "implicit rewards, adapter": lambda: implicit(policy, folder / "implicit rewards, adapter", peft_config=lora),
        "listwise_dpo": lambda: ListwiseDPOTrainer(
            policy, listwise_config(folder / "listwise_dpo", **settings(eval_strategy="no")), rankings(24, most=3)
        ),
        "srpo": lambda: SRPOTrainer(policy, srpo_config(folder / "srpo", **settings()), pairs, eval_pairs),
        "kto": lambda: KTOTrainer(policy, kto_config(folder / "kto", **settings()), pairs, eval_pairs),
        "reward": lambda: RewardTrainer(
            policy, reward_runs.config(folder / "reward", **settings()), pairs, eval_pairs, toy.tokenizer()
        ),
        "remax": lambda: on_prompts("remax"),
        # conversations of several turns, and the entropy's gradient through the head
        "game": lambda: game(folder / "game", **settings(eval_strategy="no", entropy_coef=0.1)),
        # whose reference moves with the policy's shards
        "online_dpo": lambda: on_prompts("online_dpo", sync_ref_model=True, ref_model_sync_steps=2),
        "d2po": d2po,
        "metaapo": lambda: metaapo(policy, folder / "metaapo"),
        "ppo": lambda: on_prompts("ppo", num_mini_batches=2, num_iterations=2, max_steps=8, save_steps=3),
    }
    return {**made, **{f"{name} resumed": made[name] for name in RESUMED}}


def train(policy: str, folder: Path, *names: str) -> dict[str, dict[str, list]]:
    """What was logged, by method; the trained models are in folder/<method>/final."""
    made, found = makers(policy, folder), {}
    for name in names:
        trainer = made[name]()
        method = name.removesuffix(" resumed")
        trainer.train(None if method == name else folder / method / RESUMED[method])
        logs = trainer.state.log_history
        found[name] = {key: [entry[key] for entry in logs if key in entry] for key in KEYS}
        trainer.save_model(str(folder / name / "final"))
        if hasattr(trainer, "close"):
            trainer.close()
        trainer.accelerator.wait_for_everyone()
    return found


def fsdp_on_processors() -> None:
    """As `configs/accelerate/fsdp2.yaml` has it. accelerate applies FSDP to accelerators alone, torch to processors
    too."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    as_it_was = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        as_it_was(self, *args, **kwargs)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
        )
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)  # as accelerate does on accelerators
        self._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    fsdp_on_processors()
    found = train(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    torch.save(found, Path(sys.argv[2]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
