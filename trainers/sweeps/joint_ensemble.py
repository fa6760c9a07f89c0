"""Reward models that share one model, trained from one pass over the data."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import ConfigError
from align.modeling.member_lora import MemberLora
from align.modeling.members import Members, member_scores
from align.modeling.rotary import LONG, factors_of
from align.objectives.pair_losses import PairLosses
from align.reward_models.normalizer import Normalizer
from align.trainers.reward import RewardConfig, RewardTrainer, agreement

logger = logging.getLogger(__name__)


class JointRewardTrainer(RewardTrainer):
    """`RewardTrainer` for a model that holds K members (`share_trunk`, `add_member_adapters`).

    Every batch is run once for all members. The loss is the sum of the members' losses, so that each gets the gradient
    that it would get alone, and each member's gradient is clipped by its own norm (a shared trunk that is trained gets
    the sum of all, clipped by itself). All members see the data in one order, that of `args.seed`.

    After training each member's normaliser is fitted. `save` writes what `load_ensemble` reads.
    """

    def __init__(self, model: nn.Module, args: RewardConfig, train_dataset, eval_dataset=None, **options):
        super().__init__(model, args, train_dataset, eval_dataset, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError("members that share a model train in one process or with DDP: drop FSDP and DeepSpeed")
        if factors_of(self.model) == LONG:
            raise ConfigError(
                "max_length is more than the model's original positions (LongRoPE), and members that share a model do "
                "not keep with which factors they were trained: lower max_length, or use ensemble_kind: separate"
            )
        self.count = next(len(module.members) for module in model.modules() if isinstance(module, Members))
        self.normalizers: list[Normalizer] = []
        self.form: dict[str, Any] = {}  # how the members are held, which names and shapes of weights do not all tell

    def further_identity(self) -> dict:
        form = json.loads(json.dumps(self.form, default=str))
        return {**super().further_identity(), **({"ensemble": form} if form else {})}

    def _share_prompts(self) -> bool:
        if self.args.batching == "shared_prefix":
            raise ConfigError(
                "batching: shared_prefix: batches of members that share a model are padded: leave it out",
                key="batching",
            )
        return False

    def pair_losses(self, model: nn.Module, batch: dict[str, Tensor]) -> PairLosses:
        """The losses are sums over the members, the rewards their mean scores; `.../member_<i>` is of each."""
        scores = member_scores(model, batch["input_ids"], batch["attention_mask"], self.count)
        chosen, rejected = scores.chunk(2, dim=1)
        losses, margins = self.losses_of_scores(chosen, rejected, batch), chosen - rejected
        metrics = {
            "rewards/margins": margins.mean(0),
            "rewards/margins_std": margins.std(0, correction=0),
            **agreement(margins.mean(0), batch),
        }
        for i in range(self.count):
            metrics |= {
                f"loss/member_{i}": losses[i],
                f"rewards/chosen/member_{i}": chosen[i],
                f"rewards/rejected/member_{i}": rejected[i],
                f"rewards/accuracies/member_{i}": agreement(margins[i], batch)["rewards/accuracies"],
            }
        return PairLosses(losses.sum(0), chosen.mean(0), rejected.mean(0), metrics)

    def _clip_grad_norm(self, model) -> Tensor:
        """Clip each member by itself; returns the norm of the whole gradient before."""
        self.accelerator.unscale_gradients()
        groups = gradients_by_member(self.model, self.count)
        norms = [torch.nn.utils.get_total_norm(group) for group in groups]
        for group, norm in zip(groups, norms, strict=True):
            scale = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in group:
                gradient.mul_(scale)
        return torch.stack(norms).norm()

    def fit_normalizer(self) -> None:
        what = self.score_pairs()
        names = [(f"rewards/chosen/member_{i}", f"rewards/rejected/member_{i}") for i in range(self.count)]
        self.normalizers = [self.normalizer_of(*pair, what) for pair in names]

    def save_normalizers(self, folders: Sequence[Path]) -> None:
        for folder, normalizer in zip(folders, self.normalizers, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            normalizer.save(folder)


def gradients_by_member(model: nn.Module, count: int) -> list[list[Tensor]]:
    """Gradients of each member's own parameters (views), then, where there are any, of those that all share."""
    groups: list[list[Tensor]] = [[] for _ in range(count)]
    own = set()
    for module in model.modules():
        if isinstance(module, MemberLora):
            own |= {id(module.lora_A), id(module.lora_B)}
            for i in range(count):
                groups[i] += [p.grad[i] for p in (module.lora_A, module.lora_B) if p.grad is not None]
        elif isinstance(module, Members):
            own |= {id(p) for p in module.parameters()}
            for i in range(count):
                groups[i] += [p.grad for p in module.members[i].parameters() if p.grad is not None]
    shared = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in own]
    return groups + ([shared] if shared else [])
