"""What must hold between a policy and its reference: they start as one, and a resumed run has the one it began with."""

import torch
from torch import Tensor

from align.errors import TrainingError
from align.modeling.logprobs import language_model


class ReferenceChecks:
    """Of a trainer whose `reference` is an `align.modeling.load.Reference`."""

    @property
    def logp_tolerance(self) -> float:
        """The largest difference of log-probs, in nats, that is taken for rounding."""
        exact = self.accelerator.mixed_precision == "no" and language_model(self.model).dtype == torch.float32
        return 1e-3 if exact else 0.3

    def check_same_start(self, logps: Tensor, ref_logps: Tensor, mask: Tensor) -> None:
        """Log-probs of the policy before its first step and of the reference; any shape, the same for the three."""
        worst = ((logps - ref_logps) * mask).abs().max()
        if not worst <= self.logp_tolerance:
            raise TrainingError(
                f"before the first step the policy and its reference differ by {worst:.4f} nats on one token "
                f"(allowed {self.logp_tolerance}): the reference is not the model that training starts from. Pass "
                "ref_model, or merge the adapter that the policy starts with"
            )

    def reference_probe(self) -> Tensor:
        """Log-probs of fixed tokens under the reference, [15]: they tell one reference from another."""
        vocabulary = language_model(self.model).config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0)).to(self.args.device)
        return self.reference.logps(ids, torch.ones_like(ids))[0].cpu()

    def check_reference(self) -> None:
        """Of a resumed run, against the probe in its checkpoint."""
        gap = (self.reference_probe() - self.resume_state["reference"]).abs().max()
        if not gap <= self.logp_tolerance:
            raise TrainingError(
                f"the reference is not the one of the run that is resumed (their log-probs differ by up to {gap:.3f} "
                "nats): start the trainer from the same model as at first, not from the checkpoint"
            )
