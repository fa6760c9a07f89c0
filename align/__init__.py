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
    "SFTTrainer": "align.trainers.sft:SFTTrainer",
    "SFTConfig": "align.trainers.sft:SFTConfig",
    "RewardTrainer": "align.trainers.reward:RewardTrainer",
    "RewardConfig": "align.trainers.reward:RewardConfig",
    "train_reward_ensemble": "align.trainers.sweeps.ensemble:train_reward_ensemble",
    "DPOTrainer": "align.trainers.dpo:DPOTrainer",
    "DPOConfig": "align.trainers.dpo:DPOConfig",
    "register_loss": "align.objectives.preference:register_loss",
    "MODPOTrainer": "align.trainers.modpo:MODPOTrainer",
    "MODPOConfig": "align.trainers.modpo:MODPOConfig",
    "MarginRewards": "align.reward_models.margins:MarginRewards",
    "train_front": "align.trainers.sweeps.front:train_front",
    "make_soup": "align.modeling.soups:make_soup",
    "SparsePOTrainer": "align.trainers.sparsepo:SparsePOTrainer",
    "SparsePOConfig": "align.trainers.sparsepo:SparsePOConfig",
    "ReMaxTrainer": "align.trainers.remax:ReMaxTrainer",
    "ReMaxConfig": "align.trainers.remax:ReMaxConfig",
    "PPOTrainer": "align.trainers.ppo:PPOTrainer",
    "PPOConfig": "align.trainers.ppo:PPOConfig",
    "RLOOTrainer": "align.trainers.rloo:RLOOTrainer",
    "RLOOConfig": "align.trainers.rloo:RLOOConfig",
    "GRPOTrainer": "align.trainers.grpo:GRPOTrainer",
    "GRPOConfig": "align.trainers.grpo:GRPOConfig",
    "ReinforcePPTrainer": "align.trainers.reinforce_pp:ReinforcePPTrainer",
    "ReinforcePPConfig": "align.trainers.reinforce_pp:ReinforcePPConfig",
    # rewards
    "Reward": "align.reward_models.base:Reward",
    "RewardBatch": "align.reward_models.base:RewardBatch",
    "RewardOutput": "align.reward_models.base:RewardOutput",
    "ClassifierReward": "align.reward_models.classifier:ClassifierReward",
    "ImplicitReward": "align.reward_models.implicit:ImplicitReward",
    "RuleReward": "align.reward_models.rules:RuleReward",
    "VerifierReward": "align.reward_models.verifier:VerifierReward",
    "RemoteReward": "align.reward_models.remote:RemoteReward",
    "CompositeReward": "align.reward_models.composite:CompositeReward",
    "export_reward_model": "align.reward_models.export:export_reward_model",
    "RewardEnsemble": "align.reward_models.ensemble:RewardEnsemble",
    "build_reward": "align.reward_models.build:build_reward",
    # rollouts
    "make_engine": "align.rollout:make_engine",
    "register_engine": "align.rollout:register_engine",
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
