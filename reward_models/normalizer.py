"""The offset and scale of a reward model, which pairwise training leaves arbitrary, fitted once and saved beside it."""

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from align.distributed.disk import write_whole
from align.errors import RewardError

FILE_NAME = "reward_normalizer.json"
CHECK = "crc32"  # of the other entries: a flipped bit of a digit is seen
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Normalizer:
    """score -> (score - mean) / std. `fitted_on` describes the `count` answers on which it was fitted."""

    mean: float
    std: float
    count: int
    fitted_on: str

    @classmethod
    def fit(cls, scores: Tensor, fitted_on: str) -> "Normalizer":
        """Mean and unbiased standard deviation of `scores` [N] (Coste et al.: all answers of the validation pairs)."""
        scores = scores.double().flatten()
        if scores.numel() < 2:
            raise RewardError(f"a normaliser needs at least two scores, got {scores.numel()} from {fitted_on}")
        if not torch.isfinite(scores).all():
            raise RewardError(f"non-finite scores among the {scores.numel()} from {fitted_on}: nothing can be fitted")
        mean, std = scores.mean().item(), scores.std(correction=1).item()
        if std <= 1e-6 * max(abs(mean), 1e-6):
            raise RewardError(
                f"all {scores.numel()} scores from {fitted_on} are {mean:.6g}: the model tells nothing apart"
            )
        return cls(mean, std, scores.numel(), fitted_on)

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / FILE_NAME
        write_whole(path, [json.dumps(asdict(self) | {CHECK: self._crc32()}, indent=2) + "\n"])
        return path

    def _crc32(self) -> int:
        return zlib.crc32(json.dumps(asdict(self), sort_keys=True).encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Normalizer | None":
        """The normaliser saved beside a model, or None. Raises `RewardError` for a file that is not one."""
        path = Path(folder) / FILE_NAME
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            written = content.pop(CHECK, None)  # a file that was written by hand has none
            saved = cls(**content)
        except (AttributeError, TypeError, ValueError, RecursionError, OSError) as error:
            raise RewardError(f"{path} is not a saved normaliser ({error}): fit it again or delete it") from error
        numbers = (saved.mean, saved.std)
        if not all(isinstance(x, int | float) and abs(x) <= LARGEST for x in numbers) or not saved.std > 0:
            raise RewardError(
                f"{path}: mean must be a finite number and std one above 0, got {saved.mean!r:.40} and "
                f"{saved.std!r:.40}: fit it again or delete it"
            )
        if written is not None and written != saved._crc32():
            raise RewardError(f"{path} does not match its checksum: fit it again, or delete {CHECK} if you changed it")
        return saved


def choose_normalizer(
    reward: str, source: str | None, normalize: bool | None, given: Normalizer | None = None
) -> Normalizer | None:
    """`given`, or the one saved beside the model `source`. normalize: True requires one, False ignores it, None uses it
    if it is there. Raises `RewardError` with the name of the reward where there is none and one is required."""
    saved = given or (Normalizer.load(source) if source else None)
    if normalize and saved is None:
        raise RewardError(
            f"reward {reward!r}: normalize is true and {source or 'the model'} has no normaliser beside it; "
            "RewardTrainer saves one, or fit one with Normalizer.fit"
        )
    return None if normalize is False else saved
