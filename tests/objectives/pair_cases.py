"""Pairs for the tests of preference losses."""

import torch

from align.objectives.pair_logps import PairLogps


def random_pairs(count=5, seed=0, dtype=torch.float64) -> PairLogps:
    """Pairs with everything that any loss looks at; chosen, rejected and the KLs are leaves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale, shift=0.0, grad=False):
        return (torch.randn(count, generator=generator, dtype=dtype) * scale + shift).requires_grad_(grad)

    return PairLogps(
        chosen=draw(3, -20, grad=True),
        rejected=draw(3, -22, grad=True),
        ref_chosen=draw(3, -20),
        ref_rejected=draw(3, -22),
        chosen_length=torch.randint(4, 12, (count,), generator=generator),
        rejected_length=torch.randint(4, 12, (count,), generator=generator),
        chosen_kl=draw(1).detach().square().requires_grad_(),
        rejected_kl=draw(1).detach().square().requires_grad_(),
    )


def pair_of(delta: float, dtype=torch.float32) -> PairLogps:
    """One pair with rho_w = delta/2, rho_l = -delta/2, ten tokens per completion, and KLs of |delta|."""
    sides = [torch.tensor([sign * delta / 2], dtype=dtype).requires_grad_() for sign in (1, -1)]
    zero, ten = torch.zeros(1, dtype=dtype), torch.full((1,), 10)
    kls = [torch.tensor([abs(delta)], dtype=dtype).requires_grad_() for _ in sides]
    return PairLogps(*sides, zero, zero, ten, ten, *kls)
