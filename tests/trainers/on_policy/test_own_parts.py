"""Estimators, weightings and policy losses of users: what is wrong is refused and named, and is not broadcast."""

from types import SimpleNamespace

import pytest
import torch

from align.errors import ConfigError, TrainingError
from align.objectives.policy_loss import clipped_policy_loss
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy import estimators
from align.trainers.on_policy.estimators import Estimate, make_estimator, register_estimator
from align.trainers.on_policy.streams import Stream, checked_losses, estimate_advantages, mix, stream_scores
from align.trainers.rloo import RLOOTrainer
from align.trainers.weighting.base import TASK, FixedWeights, StreamSpec, Weighting, make_weighting, register_weighting
from align.trainers.weighting.sections import DYNAMIC_WEIGHTS
from align.trainers.weighting.updates import WeightingUpdates
from tests.trainers.tiny_runs import logged, on_policy, prompts, wanted_words

MASK = torch.tensor([[1, 1], [1, 0], [1, 1]])
STREAM = Stream(TASK, torch.tensor([1.0, 2.0, 4.0]), None, 0.0, torch.zeros(3, 2), torch.zeros(3, 2), MASK)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (Estimate(STREAM.scores), r"advantages must be a tensor \[samples, tokens\], here \[3, 2\], got \[3\]"),
        (Estimate(STREAM.scores[:, None]), r"got \[3, 1\]; a number per sample a is a\[:, None\] \* stream.mask"),
        (Estimate([1.0, 2.0, 4.0]), "got list"),
        (STREAM.scores[:, None] * MASK, "estimate must return an Estimate, got Tensor"),
        (Estimate(STREAM.scores[:, None] / 0 * MASK), r"advantages are not finite for samples \[0, 1, 2\]"),
        (Estimate(1.0 * MASK, returns=STREAM.scores), r"returns must be .*got \[3\]"),
        (Estimate(1.0 * MASK, metrics={"mine": 1.0}), "metrics must be lists of numbers, and mine is float"),
    ],
)
def test_an_estimate_of_another_shape_is_refused(returned, message):
    """Advantages [N] became a column that was broadcast over the tokens, and were trained."""
    estimator = type("Mine", (), {"estimate": lambda self, stream, ranks: returned})()
    with pytest.raises(TrainingError, match=f"estimator Mine, stream 'task': .*{message}"):
        estimate_advantages([STREAM], estimator, FixedWeights(["a"], [1.0]), Ranks())


@pytest.mark.parametrize("weights", [[], [1.0, 2.0], [float("nan")], ["a"], None])
def test_weights_that_are_not_one_per_stream_are_refused(weights):
    """There was an error of a matrix product, or a loss that is nan."""
    weighting = type("Mine", (FixedWeights,), {"weights": lambda self: weights})(["a"], [1.0])
    with pytest.raises(TrainingError, match="weighting Mine: weights must give 1 finite numbers, one per stream, got"):
        mix(torch.zeros(3, 2, 1), weighting)


def test_a_weighting_that_returns_no_metrics_is_refused():
    weighting = type("Mine", (FixedWeights,), {"update": lambda self, columns, lengths: None})(["a"], [1.0])
    sample = SimpleNamespace(left_out=False, rewards={"a": 1.0}, written=1)
    with pytest.raises(TrainingError, match="weighting Mine: update must return metrics by name, got NoneType"):
        WeightingUpdates(weighting, Ranks(), None).learn([sample], 1)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(2, 2), "must return the losses of the tokens and a PolicyLoss"),
        ((1.0, None), "must return the losses of the tokens and a PolicyLoss"),
        ((torch.ones(2, 2), None), "the losses have no gradient"),
        ((torch.ones(2, 2, requires_grad=True), None), "must return a PolicyLoss beside the losses, got NoneType"),
    ],
)
def test_token_losses_that_are_none_are_refused(returned, message):
    with pytest.raises(TrainingError, match=f"RLOOTrainer.token_losses.*{message}"):
        checked_losses(returned, object.__new__(RLOOTrainer))


@pytest.mark.parametrize("scores", [{}, {TASK: float("nan")}, {"other": 1.0}])
def test_a_weighting_without_a_score_for_its_stream_is_refused(scores):
    class Mine(Weighting):
        def scores(self, rewards):
            return scores

    sample = type("Sample", (), {"left_out": False, "rewards": {"a": 1.0}, "bootstrap": None, "penalty": 0.0})()
    with pytest.raises(TrainingError, match="weighting Mine: scores gives no finite number for task"):
        stream_scores(sample, Mine(["a"], [1.0]))


def test_a_kl_that_no_stream_has_is_refused(tmp_path, monkeypatch):
    class Mine(FixedWeights):
        streams = [StreamSpec(TASK, penalty=1.0)]

    monkeypatch.setitem(DYNAMIC_WEIGHTS.kinds, "no_kl", None)  # taken out afterwards
    del DYNAMIC_WEIGHTS.kinds["no_kl"]
    register_weighting("no_kl", Mine)
    for kl_in in ("reward", "loss"):
        options = {"kl_in": kl_in, "dynamic_weights": {"type": "no_kl"}}
        with pytest.raises(ConfigError, match="beta is 0.1, and no stream of Mine has the KL, which would be ignored"):
            make_weighting({"a": 1.0}, on_policy("rloo", tmp_path, beta=0.1, **options)[1])
        make_weighting({"a": 1.0}, on_policy("rloo", tmp_path, beta=0.0, **options)[1])


ESTIMATOR = """
from dataclasses import dataclass
from align.trainers.on_policy.estimators import Estimate, Estimator, register_estimator

@register_estimator("again")
@dataclass
class Again(Estimator):
    def estimate(self, stream, ranks):
        return Estimate(stream.scores[:, None] * stream.mask)
"""


def test_a_registered_estimator_is_named_by_its_place_too(tmp_path, monkeypatch):
    """Its file is read more than once in a run: "there is an estimator 'again' already" was the end of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimators, "ESTIMATORS", dict(estimators.ESTIMATORS))
    (tmp_path / "mine.py").write_text(ESTIMATOR)
    for _ in range(2):
        args = on_policy("rloo", tmp_path, estimator="mine.py:Again")[1]
        assert type(make_estimator(args)).__name__ == "Again"
    with pytest.raises(ConfigError, match=r"estimator 'none.py:X': no file"):
        on_policy("rloo", tmp_path, estimator="none.py:X")
    with pytest.raises(ConfigError, match=r"weighting 'none.py:X': no file"):
        on_policy("rloo", tmp_path, dynamic_weights={"type": "none.py:X"})


def test_cells_that_are_run_again(monkeypatch):
    monkeypatch.setattr(estimators, "ESTIMATORS", dict(estimators.ESTIMATORS))
    monkeypatch.setitem(DYNAMIC_WEIGHTS.kinds, "mine", None)  # taken out afterwards
    del DYNAMIC_WEIGHTS.kinds["mine"]
    for _ in range(2):
        names = {"__name__": "__main__"}
        exec(ESTIMATOR, names)
        exec("from align.trainers.weighting.base import FixedWeights\nclass Mine(FixedWeights): ...", names)
        register_weighting("mine", names["Mine"])
    with pytest.raises(ConfigError, match="there is an estimator 'again' already"):
        register_estimator("again", estimators.ESTIMATORS["rloo"])


def test_a_policy_loss_of_one_s_own(policy, tmp_path):
    class Asymmetric(RLOOTrainer):
        """Tokens of a negative advantage count half."""

        def token_losses(self, logps, advantages, batch):
            mask, old_logps = batch["completion_mask"], batch.get("old_logps", logps.detach())
            found = clipped_policy_loss(logps, old_logps, advantages, mask)
            return found.losses * torch.where(advantages < 0, 0.5, 1.0), found

    def run(cls):
        args = on_policy("rloo", tmp_path, max_steps=1)[1]
        trainer = cls(policy, wanted_words, args, prompts(16))
        trainer.train()
        trainer.close()
        return logged(trainer, "grad_norm")

    assert run(Asymmetric) != run(RLOOTrainer)

    class Wrong(RLOOTrainer):
        def token_losses(self, logps, advantages, batch):
            losses, found = super().token_losses(logps, advantages, batch)
            return losses.sum(-1), found

    with pytest.raises(TrainingError, match=r"losses \[\d+\], mask \[\d+, \d+\]: must have one shape"):
        run(Wrong)


PARTS = """
from pydantic import Field
from align.config.sections import Section
from align.rollout import RolloutOptions
from align.rollout.transformers_engine import TransformersEngine
from align.trainers.weighting.base import FixedWeights

class Options(Section):
    level: float = 0.0

class Mine(FixedWeights):
    section = Options

    def __init__(self, names, weights, options):
        super().__init__(names, weights)
        self.updates, self.level = 0, options.level

    def update(self, columns, lengths):
        self.updates += 1
        return {**super().update(columns, lengths), "mine/updates": self.updates + self.level}

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]

class EngineOptions(RolloutOptions):
    flavour: str = Field("plain")

class Engine(TransformersEngine):
    options_class = EngineOptions

    def __init__(self, *args, flavour, **kwargs):
        assert flavour == "salty"
        super().__init__(*args, **kwargs)
"""


def test_a_run_with_parts_of_a_file_is_saved_and_resumed(policy, tmp_path, monkeypatch):
    """No pickle finds the classes of their options: the first checkpoint, or the end, was a PicklingError."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PARTS)

    def run(steps, **kwargs):
        parts = {
            "dynamic_weights": {"type": "mine.py:Mine", "level": 0.5},
            "rollout": {"backend": "mine.py:Engine", "flavour": "salty"},
        }
        args = on_policy("rloo", tmp_path / "run", max_steps=steps, save_steps=1, save_strategy="steps", **parts)[1]
        trainer = RLOOTrainer(policy, wanted_words, args, prompts(16))
        trainer.train(**kwargs)
        trainer.save_model()
        trainer.close()
        return logged(trainer, "mine/updates"), torch.load(tmp_path / "run/training_args.bin", weights_only=False)

    updates, args = run(2)
    assert updates == [1.5, 2.5]
    assert args.dynamic_weights == {"type": "mine.py:Mine", "level": 0.5} and args.rollout["flavour"] == "salty"
    assert run(3, resume_from_checkpoint=True)[0] == [1.5, 2.5, 3.5]
    with pytest.raises(ConfigError, match="type must be one of hypervolume, gradient, not 'own'"):  # not mine.py:Mine
        on_policy("rloo", tmp_path / "run", dynamic_weights={"type": "own"})
