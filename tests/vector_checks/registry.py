"""The table of checks, and what they share."""

import numpy as np
import torch

CHECKS = {}


def covers(*names):
    """Register a check for the vectors called `names`.

    A check names what it wants of the entry as its arguments: inputs, outputs, params, grads, name ...
    """

    def register(check):
        for name in names:
            assert name not in CHECKS, f"{name} is covered twice"
            CHECKS[name] = check
        return check

    return register


def t64(value):
    return torch.tensor(value, dtype=torch.float64)


def close(actual, expected, *, rtol=1e-6, atol=1e-9):
    np.testing.assert_allclose(np.asarray(actual, dtype=np.float64), np.asarray(expected), rtol=rtol, atol=atol)
