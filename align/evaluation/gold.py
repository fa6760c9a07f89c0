"""Scores to judge by, made of several metrics."""

from collections.abc import Mapping, Sequence

from align.errors import ConfigError


def range_normalised(
    values: Mapping[str, float], ranges: Mapping[str, Sequence[float]], groups: Sequence[Sequence[str]]
) -> float:
    """Mean over the groups of the mean of (x - low) / (high - low): Moskovitz et al. 2023 (arXiv 2310.04373), eq. A.1.

    Nothing is clipped, so a value outside its range leaves [0, 1]. Ranges hold for one dataset and one decoding; counts
    among the metrics depend on the size of the evaluation set too.
    """
    flat = [name for group in groups for name in group]
    for name in flat:
        if name not in values or name not in ranges:
            raise ConfigError(f"{name!r} has no {'value' if name not in values else 'range'}")
        if not ranges[name][1] > ranges[name][0]:
            raise ConfigError(f"the range of {name!r} is empty: {list(ranges[name])}")
    scaled = {name: (values[name] - ranges[name][0]) / (ranges[name][1] - ranges[name][0]) for name in flat}
    return sum(sum(scaled[name] for name in group) / len(group) for group in groups) / len(groups)
