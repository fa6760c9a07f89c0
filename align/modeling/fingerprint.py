"""A name for what a reward computes: it changes whenever the reward's weights, settings or code do."""

import functools
import hashlib
import inspect
import marshal
import types
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.errors import RewardError
from align.modeling.elsewhere import Elsewhere

# attributes that say where and in what portions something is computed, or what happened so far, not what is computed
PLACES = ("device", "batch_size", "batch_tokens", "model_folders", "calls", "history", "offloaded", "placement")


def fingerprint(value: Any, *, sampled: bool = False) -> str:
    """A hexadecimal digest of `value`: a reward, or anything that one is made of. sampled: at most 64 numbers of each
    tensor are read, so that a large model costs nothing.

    Models count by their weights and configuration, tokenizers by vocabulary and template, functions by the text of
    their file and by what they have bound. Raises `RewardError` for a value whose meaning cannot be read off (an open
    connection, say).
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(digest.update, value, set(), {}, sampled)
    return digest.hexdigest()


def model_mark(model: nn.Module) -> str:
    """What a model counts for in the sampled fingerprint of what holds it."""
    return _mark(model, set(), {}, True)


def _mark(model: nn.Module, above: set[int], models: dict[int, str], sampled: bool) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _add_parts(digest.update, model, above, models, sampled)
    return digest.hexdigest()


def _add(write, value: Any, above: set[int], models: dict[int, str], sampled: bool) -> None:
    """above: ids of the objects that hold `value`, so that a circle ends. models: marks of those read, by id."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Path, Enum, torch.dtype)):
        write(f"{type(value).__name__}:{value!r};".encode())
        return
    if isinstance(value, Elsewhere):
        if not sampled:
            raise RewardError("a model that is on other ranks has no fingerprint here: nothing tells when it changes")
        write(f"model {value.mark};".encode())
        return
    if id(value) in above:
        write(b"again;")
        return
    if isinstance(value, nn.Module):
        if id(value) not in models:  # read once, though the policy may be its own reference
            models[id(value)] = _mark(value, above, models, sampled)
        write(f"model {models[id(value)]};".encode())
        return
    _add_parts(write, value, above, models, sampled)


def _add_parts(write, value: Any, above: set[int], models: dict[int, str], sampled: bool) -> None:
    above = above | {id(value)}
    write(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
    for name, part in _parts(value, sampled):
        write(f"{name}=".encode())
        if isinstance(part, memoryview):
            write(part)
        else:
            _add(write, part, above, models, sampled)
    write(b")")


def _parts(value: Any, sampled: bool):
    """(name, part) of everything that makes `value` what it is."""
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    if isinstance(value, torch.Tensor):
        yield from [("shape", str(tuple(value.shape))), ("dtype", value.dtype)]
        plain = value.detach().flatten()
        plain = plain[:: max(len(plain) // 64, 1)][:64] if sampled else plain
        plain = plain.cpu().contiguous()
        yield "bytes", plain.flatten().view(torch.uint8).numpy().data
    elif isinstance(value, nn.Module):
        yield from sorted(value.state_dict().items())
        if isinstance(getattr(value, "config", None), PretrainedConfig):
            yield "config", value.config
    elif isinstance(value, PretrainedConfig):
        yield "json", value.to_json_string(use_diff=False)
    elif isinstance(value, PreTrainedTokenizerBase):
        yield from [("vocabulary", sorted(value.get_vocab().items())), ("template", value.chat_template)]
        yield "special", sorted((key, str(token)) for key, token in value.special_tokens_map.items())
    elif isinstance(value, functools.partial):
        yield from [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    elif isinstance(value, types.MethodType):
        yield from [("self", value.__self__), ("func", value.__func__)]
    elif isinstance(value, types.FunctionType):
        yield from [("name", value.__qualname__), ("code", _code(value)), ("defaults", value.__defaults__)]
        yield from [("keywords", value.__kwdefaults__), ("bound", [c.cell_contents for c in value.__closure__ or ()])]
    elif isinstance(value, (types.BuiltinFunctionType, type)):
        yield "name", f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, dict):
        yield from sorted(((str(key), part) for key, part in value.items()), key=lambda item: item[0])
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif isinstance(value, (set, frozenset)):
        yield from enumerate(sorted(map(fingerprint, value)))
    elif hasattr(value, "__dict__"):
        yield "code", _code(type(value))
        yield from sorted((name, part) for name, part in vars(value).items() if name not in PLACES)
    else:
        raise RewardError(f"a {type(value).__name__} has no fingerprint: nothing tells when it changes")


def _code(thing: Any) -> str | bytes:
    """The text of the file that `thing` was written in (what it calls is mostly there too), or its byte code."""
    try:
        return Path(inspect.getsourcefile(thing) or "").read_text(encoding="utf-8")
    except (TypeError, OSError):
        code = getattr(thing, "__code__", None)
        return "" if code is None else marshal.dumps(code, 2)  # later formats depend on reference counts
