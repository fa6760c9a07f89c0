"""How a weighting learns from the rollouts of an on-policy run."""

import logging
import re

import torch
from torch import Tensor

from align.errors import ConfigError
from align.objectives.policy_loss import aggregate_tokens
from align.trainers.on_policy.rollouts import Sample
from align.trainers.weighting.dynamic import GradientWeights

logger = logging.getLogger(__name__)


class WeightingUpdates:
    """Of an on-policy trainer."""

    def update_weighting(self, samples: list[Sample]) -> None:
        """Let the weighting learn from the rewards of the global batch."""
        names = self.rewards.names
        rows = self.everywhere(torch.tensor([[*(s.rewards[name] for name in names), s.length] for s in samples]))
        logged = self.weighting.update(dict(zip(names, rows[:, :-1].unbind(1), strict=True)), rows[:, -1])
        for name, value in logged.items():
            self.record(name, value)
        for message in self.weighting.messages if self.is_world_process_zero() else ():
            logger.warning("step %d: %s", self.state.global_step + 1, message)
        self.weighting.messages.clear()

    def learn_from_gradients(self, parts: list[list[Sample]]) -> None:
        """Let gradient weights learn from each reward's policy gradient on a rollout, given in micro-batches."""
        if not isinstance(self.weighting, GradientWeights):
            return
        with self.phase("objective_gradients"):
            logged = self.weighting.learn_from_gradients(self.objective_gradients(parts))
        for name, value in logged.items():
            self.record(name, value)

    def objective_gradients(self, parts: list[list[Sample]]) -> Tensor:
        """The gradient of every reward's loss on the global rollout, [rewards, parameters]."""
        model = self.accelerator.unwrap_model(self.model)
        pattern = re.compile(self.weighting.options.parameters)
        chosen = [p for name, p in model.named_parameters() if p.requires_grad and pattern.search(name)]
        if not chosen:
            raise ConfigError(f"dynamic_weights.parameters: no trained parameter's name has {pattern.pattern!r}")
        if str(self.accelerator.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED"):
            raise ConfigError(
                "dynamic_weights of type gradient works with DDP or in one process: it needs whole gradients"
            )
        streams = len(self.weighting.streams) - 1
        total = torch.zeros(streams, sum(p.numel() for p in chosen), device=self.args.device)
        count = self.loss_count([sample for part in parts for sample in part])
        for part in parts:
            batch = self._prepare_inputs(self.collate(part))
            logps, mask = self.policy_logps(model, batch)[0], batch["completion_mask"]
            for i in range(streams):
                losses = -batch["advantages"][..., i + 1] * logps
                loss = aggregate_tokens(losses, mask, self.args.loss_aggregation, count)
                found = torch.autograd.grad(loss, chosen, retain_graph=i < streams - 1, allow_unused=True)
                flat = [torch.zeros_like(p) if g is None else g for g, p in zip(found, chosen, strict=True)]
                total[i] += torch.cat([g.flatten() for g in flat]).float()
        return self.accelerator.reduce(total, reduction="sum")

    def loss_count(self, samples: list[Sample]) -> Tensor:
        """What the loss of these samples is divided by, counted over all processes."""
        count = {
            "token_mean": sum(sample.length for sample in samples),
            "constant": len(samples) * self.args.max_completion_length,
        }.get(self.args.loss_aggregation, len(samples))
        return self.accelerator.gather(torch.tensor([count], device=self.args.device)).sum()
