"""Rewards that are Python functions."""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from numbers import Real
from pathlib import Path

import torch

from align.errors import ConfigError, RewardError
from reward_models.base import Reward, RewardBatch, RewardOutput


class RuleReward(Reward):
    """A function called with the keyword arguments that it names.

    Of `prompts`, `completions`, `prompt_ids`, `completion_ids` and the dataset's columns it gets those among its
    parameters (all of them if it takes `**kwargs`), each a list with one entry per completion, and it returns one
    number per completion. Functions written as TRL reward functions work as they are.

    Args:
        function: the function, or where it is: "package.module:name" or "path/file.py:name".
        name: in metrics and errors; by default the function's name.
    """

    def __init__(self, function: str | Callable, *, name: str | None = None):
        self.source = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        self.function = import_function(function) if isinstance(function, str) else function
        self.name = name or self.source.rpartition(":")[2].rpartition(".")[2]
        if inspect.iscoroutinefunction(self.function):
            raise ConfigError(f"reward function {self.source} is async; reward functions must be plain functions")
        parameters = inspect.signature(self.function).parameters.values()
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
            raise ConfigError(f"reward function {self.source} has positional-only parameters; it is called by name")
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self.accepts = {p.name for p in named}
        self.required = {p.name for p in named if p.default is p.empty}

    def _score(self, batch: RewardBatch) -> RewardOutput:
        available = {**batch.columns, "prompts": batch.prompts, "completions": batch.completions}
        if batch.prompt_ids is not None:
            available["prompt_ids"] = batch.prompt_ids
        if batch.completion_ids is not None:
            available["completion_ids"] = batch.completion_ids
        missing = sorted(self.required - available.keys())
        if missing:
            raise RewardError(
                f"reward {self.name!r}: {self.source} needs {', '.join(missing)}, and there is only "
                f"{', '.join(sorted(available))}. Add the column to the dataset, or give the parameter a default."
            )
        given = available if self.takes_all else {k: v for k, v in available.items() if k in self.accepts}
        try:
            scores = self.function(**given)
        except Exception as error:
            error.add_note(f"(raised by the reward function {self.source}, reward {self.name!r})")
            raise
        return RewardOutput(self._checked(scores, len(batch)))

    def _checked(self, scores, count: int) -> torch.Tensor:
        scores = scores.tolist() if hasattr(scores, "tolist") else scores
        if not isinstance(scores, (list, tuple)) or len(scores) != count:
            what = f"{len(scores)} values" if isinstance(scores, (list, tuple)) else type(scores).__name__
            raise RewardError(f"reward {self.name!r}: {self.source} returned {what} for {count} completions")
        bad = [i for i, score in enumerate(scores) if not isinstance(score, Real) or not math.isfinite(score)]
        if bad:
            raise RewardError(
                f"reward {self.name!r}: {self.source} returned {scores[bad[0]]!r} for rows {bad[:10]} of the batch; "
                "every completion needs a finite number"
            )
        return torch.tensor([float(score) for score in scores], dtype=torch.float32)


def import_function(path: str) -> Callable:
    """The function at "package.module:name" or "file.py:name". Modules are looked for in the current folder too."""
    module_name, _, name = path.rpartition(":")
    if not module_name or not name:
        raise ConfigError(f"reward function {path!r}: expected package.module:name or file.py:name")
    module = _load_file(Path(module_name), path) if module_name.endswith(".py") else _import(module_name, path)
    function = getattr(module, name, None)
    if not callable(function):
        defined = sorted(k for k, v in vars(module).items() if inspect.isfunction(v) and not k.startswith("_"))
        raise ConfigError(
            f"reward function {path!r}: no function {name!r} there; it has {', '.join(defined) or 'none'}"
        )
    return function


def _import(module_name: str, path: str):
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module exists and lacks something of its own
        raise ConfigError(f"reward function {path!r}: no module {error.name!r} in {folder} or on the path") from error
    finally:
        sys.path.remove(folder)


def _load_file(file: Path, path: str):
    if not file.is_file():
        raise ConfigError(f"reward function {path!r}: no file {file.resolve()}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
