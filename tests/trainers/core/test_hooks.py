"""Methods of transformers' and TRL's trainers that ours take the place of, and those that they do not."""

import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import trl
from transformers import Trainer

import align
import align.trainers
from align import DPOTrainer
from align.errors import ConfigError
from align.trainers.core.hooks import NEVER_CALLED, OVERRIDDEN, check_overridden
from align.trainers.core.trainer import TrainerMixin
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs


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


@pytest.mark.parametrize("name", ["DPOTrainer", "GRPOTrainer", "RewardTrainer", "RLOOTrainer", "SFTTrainer"])
def test_methods_that_only_trl_calls_are_refused(name):
    """All that a subclass of TRL's trainer may override: what ours do not have either would have no effect."""
    ours = getattr(align, name)
    methods = {method for method, value in vars(getattr(trl, name)).items() if inspect.isfunction(value)}
    assert {method for method in methods if not hasattr(ours, method)} <= set(NEVER_CALLED)
    for method in (method for method in NEVER_CALLED if not hasattr(ours, method)):
        with pytest.raises(ConfigError, match=f"^Mine.{method}: TRL's trainers call a method of this name, and those"):
            type("Mine", (ours,), {method: lambda self: None})
    assert type("Mine", (ours,), {"compute_loss": ours.compute_loss, "my_own": lambda self: None})


def test_a_loss_that_evaluations_do_not_take_is_said(policy, tmp_path, caplog):
    class Halved(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) / 2

    said = "compute_loss changes what is trained, and not eval_loss"
    args = dpo_config(tmp_path, max_steps=1)
    for cls, evaluated, expected in [
        (Halved, toy_pairs(4), True),
        (Halved, None, False),
        (DPOTrainer, toy_pairs(4), False),
    ]:
        caplog.clear()
        cls(policy, args=args, train_dataset=toy_pairs(8), eval_dataset=evaluated)
        assert (said in caplog.text) == expected
