"""The methods of transformers' `Trainer` that ours take the place of."""

import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
from transformers import Trainer

import align.trainers
from align.errors import ConfigError
from align.trainers.core.hooks import OVERRIDDEN, check_overridden
from align.trainers.core.trainer import TrainerMixin


def trainers(cls: type) -> list[type]:
    return [cls, *(found for below in cls.__subclasses__() for found in trainers(below))]


def test_every_private_method_that_is_overridden_is_looked_for():
    for module in pkgutil.walk_packages(align.trainers.__path__, "align.trainers."):
        importlib.import_module(module.name)
    parts = {part for cls in trainers(TrainerMixin) for part in cls.__mro__ if part.__module__.startswith("align.")}
    defined = {name for part in parts for name, value in vars(part).items() if inspect.isfunction(value)}
    private = {name for name in defined if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if hasattr(Trainer, name)} == set(OVERRIDDEN)


def test_a_transformers_that_has_another_name_for_one_is_refused():
    check_overridden(Trainer)
    other = SimpleNamespace(**dict.fromkeys(OVERRIDDEN[1:]))
    with pytest.raises(ConfigError, match=f"has no Trainer.{OVERRIDDEN[0]}, in whose place align"):
        check_overridden(other)
