"""Dataset formats, tokenisation, collation, and the embedded toy world.

Every name is loaded when it is first used: reading a file must not import torch, nor the toy world `datasets`.
"""

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
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0604  (names served by __getattr__)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'align.data' has no attribute {name!r}")
    from align.lazy import load

    return load(f"align.data.{_EXPORTS[name]}:{name}")
