"""What must hold between a policy and its reference: they start as one, and a resumed run has the one it began with."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from align.errors import TrainingError
from align.modeling.load import Reference
from align.modeling.logprobs import language_model


def logp_tolerance(accelerator: Accelerator, model: nn.Module) -> float:
    """The largest difference of log-probs, in nats, that is taken for rounding."""
    exact = accelerator.mixed_precision == "no" and language_model(model).dtype == torch.float32
    return 1e-3 if exact else 0.3


def check_same_start(logps: Tensor, ref_logps: Tensor, mask: Tensor, tolerance: float) -> None:
    """Log-probs of the policy before its first step and of the reference; any shape, the same for the three."""
    worst = ((logps - ref_logps) * mask).abs().max()
    if not worst <= tolerance:
        raise TrainingError(
            f"before the first step the policy and its reference differ by {worst:.4f} nats on one token "
            f"(allowed {tolerance}): the reference is not the model that training starts from. Pass "
            "ref_model, or merge the adapter that the policy starts with"
        )


def reference_probe(reference: Reference, device: torch.device) -> Tensor:
    """Log-probs of fixed tokens under the reference, [15]: they tell one reference from another."""
    vocabulary = language_model(reference.model).config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0)).to(device)
    return reference.logps(ids, torch.ones_like(ids))[0].cpu()


def check_reference(probe: Tensor, saved: Tensor, tolerance: float) -> None:
    """Of a resumed run: `reference_probe` now, and the one in its checkpoint."""
    gap = (probe - saved).abs().max()
    if not gap <= tolerance:
        raise TrainingError(
            f"the reference is not the one of the run that is resumed (their log-probs differ by up to {gap:.3f} "
            "nats): start the trainer from the same model as at first, not from the checkpoint"
        )
