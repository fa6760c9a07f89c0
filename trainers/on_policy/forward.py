"""Passes without gradient over the samples: what the loss and the evaluation need to know of each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from align.modeling.completions import completion_logps
from align.modeling.load import Reference
from align.objectives.kl import k1, k3, masked_sum
from align.trainers.on_policy.batches import BatchPlanner
from align.trainers.on_policy.samples import Sample, scatter


class ForwardPasses:
    """Passes over micro-batches of samples, by policy, reference and critic.

    Args:
        prepare: puts a batch where the models are.
        temperature: log-probs are taken at it.
    """

    def __init__(
        self,
        planner: BatchPlanner,
        prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        temperature: float,
    ):
        self.planner, self.prepare, self.temperature = planner, prepare, temperature

    @torch.no_grad()
    def fill(self, parts: list[list[Sample]], name: str, compute: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """Give every sample its row of what `compute` says of its micro-batch, [B, L, ...]."""
        for part in parts:
            scatter(part, name, compute(self.prepare(self.planner.collate(part))))

    @torch.no_grad()
    def fill_values(self, parts: list[list[Sample]], values: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """Give every sample its values, and those of the state after its last token if it was cut. values: of the
        critic, [B, L, streams]."""
        for part in parts:
            found = values(self.prepare(self.planner.collate_states(part))).cpu()
            for sample, row in zip(part, found, strict=True):
                sample.values = row[: sample.length].clone()
                sample.bootstrap = row[sample.length].clone() if sample.truncated else None

    def reference_logps(self, reference: Reference) -> Callable[[dict[str, Tensor]], Tensor]:
        """Computes the log-probs of the completions' tokens under the reference, [B, L]."""

        def compute(batch: dict[str, Tensor]) -> Tensor:
            with reference.active() as model:
                return completion_logps(model, batch, temperature=self.temperature)

        return compute

    @torch.no_grad()
    def fill_old(self, parts: list[list[Sample]], model: nn.Module) -> None:
        """Give every sample its log-probs under the policy as it is, and the entropies of its tokens."""
        for part in parts:
            batch = self.prepare(self.planner.collate(part))
            logps, entropies = completion_logps(model, batch, temperature=self.temperature, return_entropy=True)
            scatter(part, "old_logps", logps)
            scatter(part, "entropies", entropies)

    def policy_logps(self, model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        """Computes them under the policy."""
        return lambda batch: completion_logps(model, batch, temperature=self.temperature)

    @torch.no_grad()
    def kl_and_entropy(
        self, parts: list[list[Sample]], model: nn.Module, reference: Reference
    ) -> dict[int, tuple[float, float, float]]:
        """k1 and k3 of each sequence and the mean entropy of its tokens, nats, by the `id` of the sample.

        model: not the DDP wrapper, whose buffers would be broadcast; with FSDP2 the sharded one.
        """
        was_training = model.training
        model.eval()
        found: dict[int, tuple[float, float, float]] = {}
        for part in parts:
            self.fill([part], "ref_logps", self.reference_logps(reference))
            batch = self.prepare(self.planner.collate(part))
            logps, entropy = completion_logps(model, batch, temperature=self.temperature, return_entropy=True)
            mask = batch["completion_mask"]
            sums = [masked_sum(e(logps, batch["ref_logps"]), mask, dim=-1) for e in (k1, k3)]
            values = torch.stack([*sums, masked_sum(entropy, mask, dim=-1) / mask.sum(-1)], dim=-1)
            for sample, (kl, kl_k3, mean_entropy) in zip(part, values.tolist(), strict=True):
                found[id(sample)] = (kl, kl_k3, mean_entropy)
        model.train(was_training)
        return found
