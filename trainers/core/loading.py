"""How the options of a run load a model that is passed by its name, its tokenizer and its chat template."""

import copy
from pathlib import Path
from typing import Any

import trl

from align.errors import ConfigError, one_line
from align.modeling.load import load_tokenizer

TEMPLATES = (".jinja", ".j2")


def loading_options(args: Any, model: Any) -> dict[str, Any]:
    """`model_init_kwargs` and `trust_remote_code` for a model that is named; ConfigError for `model_init_kwargs` with
    one that is loaded already."""
    options = dict(args.model_init_kwargs or {})
    if isinstance(model, str | Path):
        return {**({"trust_remote_code": True} if args.trust_remote_code else {}), **options}
    if options:
        raise ConfigError(
            "model_init_kwargs are for loading a model by its name, and this one is loaded: load it with them, or set "
            "the command's own options (dtype, attn_implementation, model_revision)",
            key="model_init_kwargs",
        )
    return {}


def tokenizer_of(args: Any, model: Any, given: Any = None):
    """The tokenizer that was given, or the model's own."""
    return given or load_tokenizer(model, **({"trust_remote_code": True} if args.trust_remote_code else {}))


def set_chat_template(path: str | None, model: Any, tokenizer: Any, *, adapter: bool) -> None:
    """`chat_template_path`, as TRL has it: a file (.jinja, .j2) whose text becomes the tokenizer's template, or a
    folder or hub name of a tokenizer whose template, end token and missing special tokens this one takes over; the
    model's embeddings grow with them. In place. ConfigError for what cannot be read, and for new tokens under an
    adapter."""
    if path is None:
        return
    if path.endswith(TEMPLATES):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"chat_template_path {path!r} cannot be read: {error}", key="chat_template_path"
            ) from error
        return
    source = load_tokenizer(path)
    if source.chat_template is None:
        raise ConfigError(f"chat_template_path: the tokenizer {path!r} has no chat template", key="chat_template_path")
    added, known = source.added_tokens_decoder.values(), tokenizer.get_vocab()
    new = [token.content for token in added if token.content not in known]
    if adapter and new:
        raise ConfigError(
            f"chat_template_path: {path} has special tokens that the model lacks ({', '.join(new[:5])}), and an "
            "adapter would not train them: add them with trl.clone_chat_template, save the model, and start from that",
            key="chat_template_path",
        )
    try:
        trl.clone_chat_template(model, tokenizer, path)
    except ValueError as error:
        raise ConfigError(f"chat_template_path {path!r}: {one_line(error)}", key="chat_template_path") from error


def training_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer that renders conversations of several turns: with TRL's chat template for training, where it has
    one for the family and the tokenizer's own is none. That renders a turn the same whatever follows it, which
    templates do not that leave out the thoughts of earlier turns, and marks the assistant's turns."""
    if tokenizer.chat_template is None:
        return tokenizer
    try:
        template = trl.get_training_chat_template(tokenizer)
    except ValueError:  # it knows some families; else the turns are found by rendering
        return tokenizer
    if template is None:
        return tokenizer
    renders = copy.deepcopy(tokenizer)
    renders.chat_template = template
    return renders
