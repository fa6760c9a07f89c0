"""Dataset formats, tokenisation, collation, and the embedded toy world.

Every name is loaded when it is first used: reading a file must not import torch, nor the toy world `datasets`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same table for editors and type checkers
    from align.data.bad_rows import BadRows as BadRows
    from align.data.collate import CompletionCollator as CompletionCollator
    from align.data.collate import PairCollator as PairCollator
    from align.data.collate import left_pad as left_pad
    from align.data.collate import right_pad as right_pad
    from align.data.describe import describe_example as describe_example
    from align.data.formats import DataFormat as DataFormat
    from align.data.formats import detect_format as detect_format
    from align.data.ranked import tokenize_ranked as tokenize_ranked
    from align.data.rows import load_rows as load_rows
    from align.data.shared_prefix import SharedPrefixCollator as SharedPrefixCollator
    from align.data.tokenize import tokenize_completions as tokenize_completions
    from align.data.tokenize import tokenize_pairs as tokenize_pairs
    from align.data.tokenize import tokenize_prompts as tokenize_prompts
    from align.data.unpaired import tokenize_unpaired as tokenize_unpaired

_EXPORTS = {
    "BadRows": "bad_rows",
    "CompletionCollator": "collate",
    "DataFormat": "formats",
    "PairCollator": "collate",
    "SharedPrefixCollator": "shared_prefix",
    "describe_example": "describe",
    "detect_format": "formats",
    "left_pad": "collate",
    "load_rows": "rows",
    "right_pad": "collate",
    "tokenize_completions": "tokenize",
    "tokenize_pairs": "tokenize",
    "tokenize_prompts": "tokenize",
    "tokenize_ranked": "ranked",
    "tokenize_unpaired": "unpaired",
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0604  (names served by __getattr__)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'align.data' has no attribute {name!r}")
    from align.lazy import load

    return load(f"align.data.{_EXPORTS[name]}:{name}")
