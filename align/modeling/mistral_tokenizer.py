"""The tokenizers that mistral-common makes of Mistral's `tekken.json`, as tokenizers of transformers.

Where the package mistral-common is installed, as vLLM has it, transformers loads a model with a `tekken.json` with its
`MistralCommonBackend`, whatever other files the model has. That has no chat template, reads no control token in a text
and does not say where in the text its tokens are, on which data, rollouts and rewards here are built.
"""

from pathlib import Path
from typing import Any

from align.data.encode import is_mistral_commons
from align.data.hub import offline_if_unreachable
from align.errors import ConfigError, one_line

QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


def as_transformers_own(tokenizer: Any, source: str, revision: str | None = None) -> Any:
    """The same vocabulary and rules as a fast tokenizer of transformers, which a run saves as `tokenizer.json`. Its
    chat template is the model's published one (`chat_template.jinja`), else the one that mistral-common writes for
    this version of its format. Any other tokenizer comes back as it is."""
    if not is_mistral_commons(tokenizer):
        return tokenizer
    from transformers.integrations.mistral import convert_tekken_tokenizer
    from transformers.utils import cached_file

    path = Path(tokenizer._tokenizer_path)
    if path.suffix != ".json":
        raise ConfigError(
            f"the tokenizer of {source} is mistral-common's alone ({path.name}): put the model's tokenizer.json and "
            "tokenizer_config.json beside it"
        )
    with offline_if_unreachable(source):
        published = cached_file(source, "chat_template.jinja", revision=revision, **QUIET)
    try:
        template = Path(published).read_text(encoding="utf-8") if published else None
        converted = convert_tekken_tokenizer(str(path), template)
    except Exception as error:  # of damaged files: anything
        raise ConfigError(f"cannot load the tokenizer {source!r}: {one_line(error)}") from error
    converted.name_or_path = source
    return converted
