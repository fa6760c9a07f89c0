"""Align language models with preferences and rewards, and see when a reward stops being trustworthy.

`from align import SFTTrainer, SFTConfig, RewardEnsemble, make_engine, ...`: a public name is loaded when it is first
used, so `import align` itself is quick and imports neither torch nor transformers.

Importing align sets four environment variables where they are not set, and nothing else: what the libraries below it
would report to their makers is off (`HF_HUB_DISABLE_TELEMETRY`, `VLLM_NO_USAGE_STATS`, `DO_NOT_TRACK`,
`WANDB_ERROR_REPORTING`). Set them yourself before the import to decide otherwise.
"""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

_EXPORTS = {
    # training
    "SFTTrainer": "trainers.sft:SFTTrainer",
    "SFTConfig": "trainers.sft:SFTConfig",
    "RewardTrainer": "trainers.reward:RewardTrainer",
    "RewardConfig": "trainers.reward:RewardConfig",
    "train_reward_ensemble": "trainers.reward_ensemble:train_reward_ensemble",
    "DPOTrainer": "trainers.dpo:DPOTrainer",
    "DPOConfig": "trainers.dpo:DPOConfig",
    "register_loss": "align.objectives.preference:register_loss",
    "MODPOTrainer": "trainers.modpo:MODPOTrainer",
    "MODPOConfig": "trainers.modpo:MODPOConfig",
    "MarginRewards": "reward_models.margins:MarginRewards",
    "train_front": "trainers.front:train_front",
    "make_soup": "align.modeling.soups:make_soup",
    "SparsePOTrainer": "trainers.sparsepo:SparsePOTrainer",
    "SparsePOConfig": "trainers.sparsepo_options:SparsePOConfig",
    "ReMaxTrainer": "trainers.remax:ReMaxTrainer",
    "ReMaxConfig": "trainers.remax:ReMaxConfig",
    "PPOTrainer": "trainers.ppo:PPOTrainer",
    "PPOConfig": "trainers.ppo:PPOConfig",
    "RLOOTrainer": "trainers.rloo:RLOOTrainer",
    "RLOOConfig": "trainers.rloo:RLOOConfig",
    "GRPOTrainer": "trainers.grpo:GRPOTrainer",
    "GRPOConfig": "trainers.grpo:GRPOConfig",
    "ReinforcePPTrainer": "trainers.reinforce_pp:ReinforcePPTrainer",
    "ReinforcePPConfig": "trainers.reinforce_pp:ReinforcePPConfig",
    # rewards
    "Reward": "reward_models.base:Reward",
    "RewardBatch": "reward_models.base:RewardBatch",
    "RewardOutput": "reward_models.base:RewardOutput",
    "ClassifierReward": "reward_models.classifier:ClassifierReward",
    "ImplicitReward": "reward_models.implicit:ImplicitReward",
    "RuleReward": "reward_models.rules:RuleReward",
    "VerifierReward": "reward_models.verifier:VerifierReward",
    "RemoteReward": "reward_models.remote:RemoteReward",
    "CompositeReward": "reward_models.composite:CompositeReward",
    "export_reward_model": "reward_models.export:export_reward_model",
    "RewardEnsemble": "reward_models.ensemble:RewardEnsemble",
    "build_reward": "reward_models.build:build_reward",
    # rollouts
    "make_engine": "align.rollout:make_engine",
    "RolloutEngine": "align.rollout.engine:RolloutEngine",
    "SamplingParams": "align.rollout.types:SamplingParams",
    # data and evaluation
    "load_rows": "align.data.rows:load_rows",
    "read_run": "align.evaluation.records:read_run",
    "find_proxy_point": "align.evaluation.proxy_points:find_proxy_point",
    "evaluate_reward": "align.evaluation.reward_eval:evaluate_reward",
    # errors
    "AlignError": "align.errors:AlignError",
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0604  (names served by __getattr__)


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        value = version("align-rlhf")
    elif name in _EXPORTS:
        from align.lazy import load

        value = load(_EXPORTS[name])
    else:
        raise AttributeError(f"module 'align' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, "__version__"})
