"""How the options of a run load a model that is passed by its name, its tokenizer and its chat template."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from torch import nn
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from align.errors import ConfigError, one_line
from align.modeling.dropout import disable_dropout
from align.modeling.load import load_policy, load_tokenizer, train_in_float32
from align.modeling.padding import fit_padding
from align.modeling.pretrained import default_dtype, empty_model, pretrained_config
from align.modeling.rotary import original_positions
from align.modeling.types import Model
from align.trainers.core.processes import check_layers

TEMPLATES = (".jinja", ".j2")
ORDINARY = {"revision", "dtype", "attn_implementation", "quantization_config", "device_map", "low_cpu_mem_usage"}
"""Loading options that change neither a model's vocabulary nor its positions."""


def loading_options(args: Any, model: Any, quantization_config: Any = None) -> dict[str, Any]:
    """`model_init_kwargs`, `trust_remote_code` and `quantization_config` for a model that is named; ConfigError for the
    first and the last with one that is loaded already."""
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ConfigError("quantization_config is given twice: leave that in model_init_kwargs out")
        if not isinstance(model, str | Path):
            raise ConfigError(
                "quantization_config is for loading a model by its name, and this one is loaded: load it with that, as "
                "from_pretrained(..., quantization_config=...)"
            )
        options["quantization_config"] = quantization_config
    if isinstance(model, str | Path):
        if options.get("quantization_config") is not None:
            # quantised weights cannot be moved afterwards: every process loads them to where it trains
            options.setdefault("device_map", {"": args.device})
        return {**({"trust_remote_code": True} if args.trust_remote_code else {}), **options}
    if options:
        raise ConfigError(
            "model_init_kwargs are for loading a model by its name, and this one is loaded: load it with them, or set "
            "the command's own options (dtype, attn_implementation, model_revision)",
            key="model_init_kwargs",
        )
    return {}


def load_to_train(args: Any, model: Any, quantization_config: Any, tokenizer: Any, *, adapter: bool) -> nn.Module:
    """A policy to which TRL may add an adapter: the frozen weights under it stay as they were saved on a GPU."""
    options = loading_options(args, model, quantization_config)
    if isinstance(model, nn.Module):
        train_in_float32(model, adapter=adapter)
    else:
        model = load_policy(model, **{"dtype": default_dtype(frozen=adapter), **options}, sharded=True)
    if args.eos_token is not None:
        end_as_tokenizer(model, tokenizer)
    set_seed(args.seed)  # TRL draws the adapter, and the embeddings of new tokens are drawn
    return model


def load_trained(args: Any, model: Any, peft_config: Any, options: dict[str, Any]) -> Model:
    """A policy with its adapter. options: of `loading_options`."""
    set_seed(args.seed)  # what is drawn besides
    policy = load_policy(model, peft_config=peft_config, adapter_seed=args.seed, sharded=True, **options)
    train_in_float32(policy, adapter=peft_config is not None)
    if args.disable_dropout:
        disable_dropout(policy)
    return policy


def without_weights(args: Any, model: Any, *, classifier: bool = False) -> Model | None:
    """A model that is named, made from its config alone: what its rows can be checked with before the weights are read,
    which takes minutes for a large one. None where the config does not say enough: a loaded model, code of the model's
    own, LongRoPE, whose factors are chosen once, GGUF files, and ZeRO-3, which makes no model without weights."""
    options = dict(args.model_init_kwargs or {})
    if not isinstance(model, str | Path) or args.trust_remote_code or options.keys() - ORDINARY:
        return None
    if is_deepspeed_zero3_enabled():
        return None
    revision = {"revision": options["revision"]} if options.get("revision") else {}
    config = pretrained_config(str(model), "model", **revision)
    if original_positions(config) is not None:
        return None
    empty = empty_model(str(model), classifier=classifier, **revision)
    check_layers(args, empty)
    return empty


def tokenizer_of(args: Any, model: Any, given: Any = None):
    """The tokenizer that was given, or the model's own, of the same revision; with the `eos_token` of a configuration
    that has one, in place, as in TRL."""
    options: dict[str, Any] = {"trust_remote_code": True} if args.trust_remote_code else {}
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str | Path) else None
    options |= {"revision": revision} if revision else {}
    if given is None:
        given = load_tokenizer(model, **options)
    else:
        fit_padding(given, model, **options)
    if getattr(args, "eos_token", None) is not None:
        set_end_token(args.eos_token, given)
    return given


def set_end_token(token: str, tokenizer: Any) -> None:
    """In place. ConfigError for a token that is not in the vocabulary."""
    if token not in tokenizer.get_vocab():
        raise ConfigError(f"eos_token: {token!r} is not in the vocabulary of the tokenizer", key="eos_token")
    tokenizer.eos_token = token


def end_as_tokenizer(model: Any, tokenizer: Any) -> None:
    """The model's end token becomes the tokenizer's; generation stops at those of before too. In place."""
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    generation = getattr(model, "generation_config", None)  # classifiers have none
    if generation is not None:
        known = generation.eos_token_id
        known = [] if known is None else [known] if isinstance(known, int) else known
        generation.eos_token_id = [tokenizer.eos_token_id, *(i for i in known if i != tokenizer.eos_token_id)]


def with_template(path: str | None, load: Callable[[], Any], tokenizer: Any, *, adapter: bool) -> Callable[[], Any]:
    """`chat_template_path`, as TRL has it: a file (.jinja, .j2) whose text becomes the tokenizer's template, or a
    folder or hub name of a tokenizer whose template, end token and missing special tokens this one takes over; the
    model's embeddings grow with them. In place. ConfigError for what cannot be read, and for new tokens under an
    adapter.

    load: loads the model. Returns the same: for the latter it is loaded now, as the tokens are of both.
    """
    if path is None:
        return load
    if path.endswith(TEMPLATES):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"chat_template_path {path!r} cannot be read: {error}", key="chat_template_path"
            ) from error
        return load
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
    model = load()
    try:
        trl.clone_chat_template(model, tokenizer, path)
    except ValueError as error:
        raise ConfigError(f"chat_template_path {path!r}: {one_line(error)}", key="chat_template_path") from error
    return lambda: model


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
