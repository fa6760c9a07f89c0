"""A name for what a reward computes: it changes whenever the reward's weights, settings or code do."""

import functools
import hashlib
import inspect
import re
import sysconfig
import types
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from align.errors import RewardError
from align.lazy import INSTALLED
from align.modeling.elsewhere import Elsewhere

# attributes that say where and in what portions something is computed, or what happened so far, not what is computed
PLACES = ("device", "batch_size", "batch_tokens", "model_folders", "calls", "history", "offloaded", "placement")
STANDARD = Path(sysconfig.get_path("stdlib")).resolve()
HOLDERS = (types.FunctionType, types.MethodType, functools.partial, dict, list, tuple)


def fingerprint(value: Any) -> str:
    """A hexadecimal digest of `value`: a reward, or anything that one is made of.

    Models count by their weights and configuration, tokenizers by vocabulary and template, functions by the text of
    their file, their place in it, and what they have bound. Raises `RewardError` for a value whose meaning cannot be
    read off (an open connection, say).
    """
    return _read(value, sampled=False)


def mark(value: Any) -> str:
    """The same of whatever there is, at little cost: at most 64 numbers of each tensor are read, and a part that has no
    fingerprint, such as a lock or an open connection, counts by its kind. What else such a part holds counts where it
    is a function, a list or an object of this library, or is held by one of these. The code of this library counts by
    name, so that a run goes on with a newer version of it.

    A class of this library names in `elsewhere` the attributes that say where something is asked, and how patiently.
    """
    return _marked(value, set(), True)


def _read(value: Any, sampled: bool) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _add(digest.update, value, set(), {}, sampled)
    return digest.hexdigest()


def _marked(value: Any, above: set[int], inside: bool) -> str:
    """inside: whether the parts of a value without fingerprint count. above: ids of the objects that hold it."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if id(value) in above:
        return "again"
    try:
        return _read(value, sampled=True)
    except (RewardError, RecursionError):
        if not inside:
            return kind
    try:
        parts = list(_parts(value, True))
    except RewardError:
        return kind
    passed_on = isinstance(value, HOLDERS) or type(value).__module__.startswith("align.")
    above = above | {id(value)}
    found = [f"{name}={_marked(part, above, passed_on)}" for name, part in parts]
    return hashlib.blake2b("\n".join([kind, *found]).encode(), digest_size=16).hexdigest()


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
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield from [("shape", str(value.shape)), ("dtype", str(value.dtype)), ("bytes", value.tobytes())]
    elif isinstance(value, re.Pattern):
        yield from [("pattern", value.pattern), ("flags", value.flags)]
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
        named = sampled and is_ours(value)
        code = value.__globals__["__name__"] if named else _code(value)
        yield from [("name", value.__qualname__), ("code", code), ("defaults", value.__defaults__)]
        yield "place", _place(value.__code__) if isinstance(code, str) and not named else None
        yield from [("keywords", value.__kwdefaults__), ("bound", [c.cell_contents for c in value.__closure__ or ()])]
    elif isinstance(value, (types.BuiltinFunctionType, type)):
        yield "name", f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, type) and value.__module__ != "builtins":
            yield "code", None if sampled and is_ours(value) else _code(value)
    elif isinstance(value, dict):
        yield from sorted(((str(key), part) for key, part in value.items()), key=lambda item: item[0])
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif isinstance(value, (set, frozenset)):
        yield from enumerate(sorted(map(fingerprint, value)))
    elif hasattr(value, "__dict__"):
        left_out = PLACES + (getattr(type(value), "elsewhere", ()) if sampled else ())
        yield "code", None if sampled and is_ours(type(value)) else _code(type(value))
        yield from sorted((name, part) for name, part in vars(value).items() if name not in left_out)
    else:
        raise RewardError(f"a {type(value).__name__} has no fingerprint: nothing tells when it changes")


def _place(code: types.CodeType) -> list:
    """Line, and column of what is computed first: a file may have several functions of one name, such as lambdas."""
    return [code.co_firstlineno, next((place for place in code.co_positions() if place[2]), None)]


def is_ours(thing: Any) -> bool:
    """Whether a function or a class is of this library; one that wraps a user's has the user's `__module__`."""
    names = thing.__globals__.get("__name__") if isinstance(thing, types.FunctionType) else thing.__module__
    return str(names).startswith("align.")


def _code(thing: Any) -> str | bytes:
    """The text of the file that `thing` was written in (what it calls is mostly there too), or its byte code; of a
    class, with those of the user's classes that it is built on."""
    functions = _written_in(thing) if isinstance(thing, type) else []
    texts = []
    for place in (*functions, thing):  # Python finds a class by the name of its module alone, which may be another's
        try:
            texts.append(Path(inspect.getsourcefile(place) or "").read_text(encoding="utf-8"))
        except (TypeError, OSError):
            pass
    codes = [part.__code__ for part in (*functions, thing) if hasattr(part, "__code__")]
    plain = _plain_attributes(thing) if isinstance(thing, type) else b""
    return "".join(dict.fromkeys(texts)) or b"".join(map(_byte_code, codes)) + plain


def _written_in(kind: type) -> list[types.FunctionType]:
    """The functions of a class, and of those under it that are neither of a library nor of this one."""
    found = [part for part in vars(kind).values() if inspect.isfunction(part)]
    for under in kind.__mro__[1:]:
        own = [part for part in vars(under).values() if inspect.isfunction(part)]
        found += [part for part in own if not (is_ours(part) or _is_installed(Path(part.__code__.co_filename)))]
    return found


def _plain_attributes(kind: type) -> bytes:
    """Of a class without functions of its own, whose file Python does not find unless it was imported by name."""
    plain = (bool, int, float, str, tuple, type(None))
    found = {name: value for name, value in vars(kind).items() if isinstance(value, plain)}
    return repr(sorted((name, repr(value)) for name, value in found.items() if not name.startswith("__"))).encode()


def _is_installed(file: Path) -> bool:
    return any(file.resolve().is_relative_to(place) for place in (STANDARD, *INSTALLED))


def _byte_code(code: types.CodeType) -> bytes:
    """Without the name of its cell of a notebook and the like, and in an order of its own where sets have none."""
    constants = [
        _byte_code(one)
        if isinstance(one, types.CodeType)
        else sorted(map(repr, one))
        if isinstance(one, frozenset)
        else one
        for one in code.co_consts
    ]
    return repr((code.co_code, code.co_names, constants)).encode()
