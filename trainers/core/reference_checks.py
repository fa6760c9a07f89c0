"""Checks of a reference: the policy starts equal to it, and a resumed run has the same one."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from align.errors import ConfigError, TrainingError
from align.modeling.load import Reference
from align.modeling.logprobs import language_model

EXACT = 1e-3  # nats, of float32
DROPOUT = (
    "the policy is trained with dropout (disable_dropout: false), and so it is not the one that draws completions or "
    "that the KL is measured to. Leave disable_dropout out"
)


def logp_tolerance(accelerator: Accelerator, model: nn.Module) -> float:
    """The largest difference of log-probs, in nats, that counts as rounding."""
    return EXACT if computes_exactly(accelerator, model) else 0.3


def computes_exactly(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether the model computes in float32."""
    return accelerator.mixed_precision == "no" and language_model(model).dtype == torch.float32


def unlike(gaps: Tensor, tolerance: float) -> str | None:
    """Why log-probs of the same tokens are not those of one model; None if they may be.

    In float32 no token may differ by more than the tolerance. In 16 bits the largest gap of rounding grows with the
    number of tokens and says nothing; the mean does not grow, so a sixth of the tolerance is allowed for it (0.05 nats
    where one token may round by 0.3). gaps: absolute differences, in nats, one per token.
    """
    largest, mean = gaps.max().item(), gaps.float().mean().item()
    if tolerance <= EXACT:
        return None if largest <= tolerance else f"differ by {largest:.4f} nats on one token (allowed {tolerance})"
    if mean <= tolerance / 6:
        return None
    return f"differ by {mean:.4f} nats on average over {gaps.numel()} tokens (allowed {tolerance / 6:.2f})"


def check_no_noise(args: TrainingArguments) -> None:
    """ConfigError for NEFTune's noise where log-probs are compared with those of a model without it."""
    if args.neftune_noise_alpha is not None:
        raise ConfigError(
            "neftune_noise_alpha: log-probs of a policy with noise in its embeddings are not those that a reference or "
            "an engine has without it, so that their difference would be the noise: leave it out. It is for SFT, "
            "reward models and losses without a reference",
            key="neftune_noise_alpha",
        )


def check_same_start(
    logps: Tensor, ref_logps: Tensor, mask: Tensor, tolerance: float, *, dropout: bool = False
) -> None:
    """Log-probs of the policy before its first step and of the reference; any shape, the same for the three. dropout:
    the policy's are with it."""
    problem = unlike((logps - ref_logps).abs()[mask.bool()], tolerance)
    if problem is None:
        return
    cause = "the reference is not the model that training starts from. Pass ref_model, or merge the adapter that the "
    raise TrainingError(
        f"before the first step the policy and its reference {problem}: "
        + (DROPOUT if dropout else f"{cause}policy starts with")
    )


def named_reference_identity(reference: Reference | None, named: bool) -> dict[str, str]:
    """Of a run whose reference is `named`: its weights. One that is not is the model that the run starts from."""
    digest = None if reference is None else reference.digest
    return {"reference": digest} if named and digest is not None else {}


def reference_probe(reference: Reference, device: torch.device) -> Tensor:
    """Log-probs of fixed tokens under the reference, [15]: they tell one reference from another."""
    vocabulary = language_model(reference.model).config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0)).to(device)
    return reference.logps(ids, torch.ones_like(ids))[0].cpu()


def check_reference(probe: Tensor, saved: Tensor, tolerance: float) -> None:
    """Of a resumed run: `reference_probe` now, and the one in its checkpoint."""
    problem = unlike((probe - saved).abs(), tolerance)
    if problem is not None:
        raise TrainingError(
            f"the reference is not the one of the run that is resumed (their log-probs {problem}): start the trainer "
            "from the same model as at first, not from the checkpoint"
        )
