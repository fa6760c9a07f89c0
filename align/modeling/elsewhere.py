"""What stands in the place of a model that other processes hold."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Elsewhere:
    """mark: a digest of samples of its weights (`align.modeling.fingerprint.model_mark`)."""

    mark: str
