"""Align language models with preferences and rewards, and see when a reward stops being trustworthy.

`from align import SFTTrainer, SFTConfig, RewardEnsemble, make_engine, ...`: a public name is loaded when it is first
used, so `import align` itself is quick and imports neither torch nor transformers.

Importing align sets four environment variables where they are not set, and nothing else: what the libraries below it
would report to their makers is off (`HF_HUB_DISABLE_TELEMETRY`, `VLLM_NO_USAGE_STATS`, `DO_NOT_TRACK`,
`WANDB_ERROR_REPORTING`). Set them yourself before the import to decide otherwise.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

if TYPE_CHECKING:  # the same table for editors and type checkers; tests compare the two
    from align.data.rows import load_rows as load_rows
    from align.errors import AlignError as AlignError
    from align.evaluation.proxy_points import find_proxy_point as find_proxy_point
    from align.evaluation.records import read_run as read_run
    from align.evaluation.reward_eval import evaluate_reward as evaluate_reward
    from align.modeling.soups import make_soup as make_soup
    from align.objectives.preference import register_loss as register_loss
    from align.reward_models.base import Reward as Reward
    from align.reward_models.base import RewardBatch as RewardBatch
    from align.reward_models.base import RewardOutput as RewardOutput
    from align.reward_models.build import build_reward as build_reward
    from align.reward_models.classifier import ClassifierReward as ClassifierReward
    from align.reward_models.composite import CompositeReward as CompositeReward
    from align.reward_models.ensemble import RewardEnsemble as RewardEnsemble
    from align.reward_models.export import export_reward_model as export_reward_model
    from align.reward_models.implicit import ImplicitReward as ImplicitReward
    from align.reward_models.margins import MarginRewards as MarginRewards
    from align.reward_models.remote import RemoteReward as RemoteReward
    from align.reward_models.rules import RuleReward as RuleReward
    from align.reward_models.specs import RewardSpec as RewardSpec
    from align.reward_models.specs import register_reward as register_reward
    from align.reward_models.verifier import VerifierReward as VerifierReward
    from align.reward_models.vllm_server import VllmReward as VllmReward
    from align.rollout import make_engine as make_engine
    from align.rollout import register_engine as register_engine
    from align.rollout.engine import RolloutEngine as RolloutEngine
    from align.rollout.options import RolloutOptions as RolloutOptions
    from align.rollout.options import VLLMOptions as VLLMOptions
    from align.rollout.types import SamplingParams as SamplingParams
    from align.trainers.d2po import D2POConfig as D2POConfig
    from align.trainers.d2po import D2POTrainer as D2POTrainer
    from align.trainers.dpo import DPOConfig as DPOConfig
    from align.trainers.dpo import DPOTrainer as DPOTrainer
    from align.trainers.grpo import GRPOConfig as GRPOConfig
    from align.trainers.grpo import GRPOTrainer as GRPOTrainer
    from align.trainers.kto import KTOConfig as KTOConfig
    from align.trainers.kto import KTOTrainer as KTOTrainer
    from align.trainers.listwise_dpo import ListwiseDPOConfig as ListwiseDPOConfig
    from align.trainers.listwise_dpo import ListwiseDPOTrainer as ListwiseDPOTrainer
    from align.trainers.metaapo import MetaAPOConfig as MetaAPOConfig
    from align.trainers.metaapo import MetaAPOTrainer as MetaAPOTrainer
    from align.trainers.modpo import MODPOConfig as MODPOConfig
    from align.trainers.modpo import MODPOTrainer as MODPOTrainer
    from align.trainers.on_policy.estimators import register_estimator as register_estimator
    from align.trainers.online_dpo import OnlineDPOConfig as OnlineDPOConfig
    from align.trainers.online_dpo import OnlineDPOTrainer as OnlineDPOTrainer
    from align.trainers.ppo import PPOConfig as PPOConfig
    from align.trainers.ppo import PPOTrainer as PPOTrainer
    from align.trainers.reinforce_pp import ReinforcePPConfig as ReinforcePPConfig
    from align.trainers.reinforce_pp import ReinforcePPTrainer as ReinforcePPTrainer
    from align.trainers.remax import ReMaxConfig as ReMaxConfig
    from align.trainers.remax import ReMaxTrainer as ReMaxTrainer
    from align.trainers.reward import RewardConfig as RewardConfig
    from align.trainers.reward import RewardTrainer as RewardTrainer
    from align.trainers.rloo import RLOOConfig as RLOOConfig
    from align.trainers.rloo import RLOOTrainer as RLOOTrainer
    from align.trainers.sft import SFTConfig as SFTConfig
    from align.trainers.sft import SFTTrainer as SFTTrainer
    from align.trainers.sparsepo import SparsePOConfig as SparsePOConfig
    from align.trainers.sparsepo import SparsePOTrainer as SparsePOTrainer
    from align.trainers.srpo import SRPOConfig as SRPOConfig
    from align.trainers.srpo import SRPOTrainer as SRPOTrainer
    from align.trainers.sweeps.ensemble import train_reward_ensemble as train_reward_ensemble
    from align.trainers.sweeps.front import train_front as train_front
    from align.trainers.weighting.base import register_weighting as register_weighting

    __version__: str

_EXPORTS = {
    # training
    "SFTTrainer": "align.trainers.sft:SFTTrainer",
    "SFTConfig": "align.trainers.sft:SFTConfig",
    "RewardTrainer": "align.trainers.reward:RewardTrainer",
    "RewardConfig": "align.trainers.reward:RewardConfig",
    "train_reward_ensemble": "align.trainers.sweeps.ensemble:train_reward_ensemble",
    "DPOTrainer": "align.trainers.dpo:DPOTrainer",
    "DPOConfig": "align.trainers.dpo:DPOConfig",
    "KTOTrainer": "align.trainers.kto:KTOTrainer",
    "KTOConfig": "align.trainers.kto:KTOConfig",
    "ListwiseDPOTrainer": "align.trainers.listwise_dpo:ListwiseDPOTrainer",
    "ListwiseDPOConfig": "align.trainers.listwise_dpo:ListwiseDPOConfig",
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
    "D2POTrainer": "align.trainers.d2po:D2POTrainer",
    "D2POConfig": "align.trainers.d2po:D2POConfig",
    "SRPOTrainer": "align.trainers.srpo:SRPOTrainer",
    "SRPOConfig": "align.trainers.srpo:SRPOConfig",
    "MetaAPOTrainer": "align.trainers.metaapo:MetaAPOTrainer",
    "MetaAPOConfig": "align.trainers.metaapo:MetaAPOConfig",
    "OnlineDPOTrainer": "align.trainers.online_dpo:OnlineDPOTrainer",
    "OnlineDPOConfig": "align.trainers.online_dpo:OnlineDPOConfig",
    # rewards
    "Reward": "align.reward_models.base:Reward",
    "RewardBatch": "align.reward_models.base:RewardBatch",
    "RewardOutput": "align.reward_models.base:RewardOutput",
    "ClassifierReward": "align.reward_models.classifier:ClassifierReward",
    "ImplicitReward": "align.reward_models.implicit:ImplicitReward",
    "RuleReward": "align.reward_models.rules:RuleReward",
    "VerifierReward": "align.reward_models.verifier:VerifierReward",
    "RemoteReward": "align.reward_models.remote:RemoteReward",
    "VllmReward": "align.reward_models.vllm_server:VllmReward",
    "CompositeReward": "align.reward_models.composite:CompositeReward",
    "export_reward_model": "align.reward_models.export:export_reward_model",
    "RewardEnsemble": "align.reward_models.ensemble:RewardEnsemble",
    "build_reward": "align.reward_models.build:build_reward",
    "RewardSpec": "align.reward_models.specs:RewardSpec",
    "register_reward": "align.reward_models.specs:register_reward",
    # rollouts
    "make_engine": "align.rollout:make_engine",
    "register_estimator": "align.trainers.on_policy.estimators:register_estimator",
    "register_weighting": "align.trainers.weighting.base:register_weighting",
    "register_engine": "align.rollout:register_engine",
    "RolloutEngine": "align.rollout.engine:RolloutEngine",
    "RolloutOptions": "align.rollout.options:RolloutOptions",
    "VLLMOptions": "align.rollout.options:VLLMOptions",
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


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("align-rlhf")
    elif name in _EXPORTS:
        from align.lazy import load

        value = load(_EXPORTS[name])
    else:
        raise AttributeError(f"module 'align' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, "__version__"})
