"""Modules of earlier versions: whoever imports one is told its new name."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder

TRAINERS = {
    "base": "core.trainer",
    "buffer": "on_policy.buffer",
    "constrained_weights": "weighting.constrained",
    "critic": "on_policy.critic",
    "dynamic_weights": "weighting.dynamic",
    "engine_sync": "on_policy.engine",
    "front": "sweeps.front",
    "loss_weighting": "sweeps.loss_weighting",
    "on_policy_config": "on_policy.config",
    "on_policy_metrics": "on_policy.metrics",
    "pair_data": "pairs.data",
    "pair_evaluation": "pairs.evaluation",
    "pair_reference": "pairs.reference",
    "preference": "pairs.preference",
    "reference_cache": "pairs.reference_cache",
    "reference_checks": "core.reference_checks",
    "reward_ensemble": "sweeps.ensemble",
    "reward_joint": "sweeps.joint_ensemble",
    "rewards": "on_policy.rewards",
    "rollout_batches": "on_policy.batches",
    "threshold_search": "weighting.search",
}  # within align.trainers


class MovedModules(MetaPathFinder):
    """Asked last, for what no other finder has found. Raises `ModuleNotFoundError` with the new name."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        folder, _, module = name.removeprefix("align.").rpartition(".")
        if folder == "trainers" and (now := TRAINERS.get(module)) is not None:
            raise ModuleNotFoundError(
                f"No module named {name!r}: it is align.trainers.{now} now; what programs use is imported from align",
                name=name,
            )


def tell_new_names() -> None:
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
