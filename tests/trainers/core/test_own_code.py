"""The code of a user's parts is compared when a run is resumed; that of this library counts by its names."""

import pytest

from align.errors import TrainingError
from align.lazy import imported
from align.modeling import fingerprint as module
from align.modeling.fingerprint import fingerprint, mark
from align.objectives.preference import LOSSES
from align.reward_models.build import build_reward
from align.trainers.core.identity import check_same_run, differences
from align.trainers.dpo import DPOTrainer
from align.trainers.online_dpo import OnlineDPOTrainer
from align.trainers.remax import ReMaxTrainer
from align.trainers.sft import SFTTrainer
from align.trainers.weighting.sections import DYNAMIC_WEIGHTS
from tests.trainers.on_policy.talks import length_of_answers, questions, talking_tokenizer
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import demonstrations, on_policy, prompts, sft_config, tiny_model, wanted_words

PARTS = """
from align.trainers.remax import ReMax
from align.trainers.weighting.base import FixedWeights

class Base:
    def reset(self, row): return None
    def step(self, answer): return None, 1.0, True

class World(Base):
    limit = 3

def add(number: str) -> str:
    '''One more.

    Args:
        number: to which.
    '''
    return number + "1"

async def slow(number: str) -> str:
    '''One more.

    Args:
        number: to which.
    '''
    return number + "1"

class Estimator(ReMax):
    def metrics(self, rollout): return super().metrics(rollout)

class Weighting(FixedWeights):
    def weights(self): return super().weights()

class Bare(FixedWeights):
    scaled = False

def loss(pairs, *, beta=0.1): return -beta * pairs.delta

def collate(rows): return rows
def constant(completions): return [0.0 for _ in completions]
"""

WEIGHTING = {"type": "mine.py:Weighting"}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the file of the parts as another process finds it, with something more in it."""
    monkeypatch.chdir(tmp_path)

    def written(more: str = "") -> None:
        DYNAMIC_WEIGHTS.kinds.pop(WEIGHTING["type"], None)
        (tmp_path / "mine.py").write_text(PARTS + more)

    written()
    yield written
    DYNAMIC_WEIGHTS.kinds.pop(WEIGHTING["type"], None)
    LOSSES.pop("loss", None)


def talks(folder, model, tokenizer, tool="add", **options):
    options |= {"environment": "mine.py:World", "tools": f"mine.py:{tool}", "estimator": "mine.py:Estimator"}
    args = on_policy("remax", folder, **{"dynamic_weights": WEIGHTING, "max_completion_length": 8, **options})[1]
    return ReMaxTrainer(model, length_of_answers, args, questions(16), processing_class=tokenizer)


def test_another_environment_at_the_same_place_is_refused(write, tmp_path):
    """The run went on with it in silence."""
    tokenizer = talking_tokenizer()

    def train(steps: int, **options) -> int:
        options |= {"save_strategy": "steps", "save_steps": 1, "max_steps": steps}
        trainer = talks(tmp_path / "run", tiny_model(tokenizer), tokenizer, **options)
        trainer.train(resume_from_checkpoint="auto")
        return trainer.state.global_step

    assert [train(1), train(2)] == [1, 2]
    write("# other\n")
    with pytest.raises(TrainingError, match=r"code.environment: .*resume_changes: \[code.environment, .*file of its"):
        train(3)
    assert train(3, resume_changes=["code"]) == 3


@pytest.mark.parametrize("tool", ["add", "slow"])
def test_every_part_of_an_on_policy_run_is_compared(write, tool, tmp_path):
    """An async tool is wrapped in a function of this library."""
    tokenizer = talking_tokenizer()
    model, found = tiny_model(tokenizer), []
    for more in ("", "", "# other\n"):
        write(more)
        found.append(talks(tmp_path, model, tokenizer, tool).identity()["code"])
    assert found[0] == found[1] and {*found[0]} == {"environment", "tools", "estimator", "weighting"}
    assert {*differences(found[1], found[2])} == {*found[0]}


def test_losses_and_collators_are_compared(write, policy, tmp_path):
    def parts() -> dict[str, str]:
        sft = SFTTrainer(policy, sft_config(tmp_path), demonstrations(8))
        assert sft.identity()["code"] == {}
        sft.data_collator = imported("mine.py:collate", "collator")
        args = on_policy("online_dpo", tmp_path, loss_type=["sigmoid", "mine.py:loss"])[1]
        dpo = DPOTrainer(policy, dpo_config(tmp_path, loss_type="mine.py:loss"), toy_pairs(8))
        online = OnlineDPOTrainer(policy, wanted_words, args, prompts(8))
        return {str(run): part for run in (sft, dpo, online) for part in run.identity()["code"].items()}

    first = [*parts().values()]
    assert [name for name, _ in first] == ["data_collator", "loss_type", "loss_type"]
    write("# other\n")
    assert not {*first} & {*parts().values()}


def test_a_run_without_parts_of_one_s_own_names_none(policy, tmp_path):
    for method in ("ppo", "online_dpo"):
        kind, args = on_policy(method, tmp_path)
        assert kind(policy, wanted_words, args, prompts(8)).identity()["code"] == {}


def test_a_checkpoint_of_a_version_without_this_is_resumed():
    now = {"settings": {}, "code": {"environment": "a" * 32}}
    assert check_same_run({"settings": {}}, now, [], "checkpoint-2") == {}
    with pytest.raises(TrainingError, match=r"code.environment: None before.*resume_changes: \[code.environment\]$"):
        check_same_run({"settings": {}, "code": {}}, now, [], "checkpoint-2")
    other = {"settings": {}, "code": {"environment": "b" * 32}}
    with pytest.raises(TrainingError, match="An environment, a tool or .* counts by the whole text of the file"):
        check_same_run(other, now, [], "checkpoint-2")
    assert {*check_same_run(other, now, ["code.environment"], "checkpoint-2")} == {"code.environment"}


def test_a_newer_version_of_this_library_is_the_same_reward(write, monkeypatch):
    """It was another one wherever a file of `align` had changed; scores that are kept are made anew."""
    specs = [
        "mine.py:constant",
        {"type": "length", "maximum": 9},
        {"type": "composite", "rewards": ["mine.py:constant"]},
    ]
    digests = (mark, fingerprint)
    before = [[digest(build_reward(spec)) for spec in specs] for digest in digests]
    code, place = module._code, module._place
    newer = lambda thing: f"{code(thing)}" + "# newer" * module.is_ours(thing)  # noqa: E731
    monkeypatch.setattr(module, "_code", newer)
    monkeypatch.setattr(
        module, "_place", lambda of: [place(of), "moved"] if "reward_models" in of.co_filename else place(of)
    )
    after = [[digest(build_reward(spec)) for spec in specs] for digest in digests]
    assert before[0] == after[0] and all(a != b for a, b in zip(before[1], after[1], strict=True))
    write("# other\n")
    assert mark(build_reward(specs[0])) != before[0][0]


def test_a_class_counts_by_its_file_and_those_that_it_is_built_on(write, tmp_path):
    def found(name: str) -> str:
        return mark(imported(name, "class"))

    (tmp_path / "over.py").write_text("from mine import World\nclass Over(World):\n    limit = 4\n")
    names = ("mine.py:World", "over.py:Over")
    first = [*map(found, names)]
    assert first == [*map(found, names)] and mark(dict) == mark(dict)
    write("# other\n")
    assert all(a != b for a, b in zip(first, map(found, names), strict=True))
    bare = found("mine.py:Bare")
    assert bare == found("mine.py:Bare")
    write("Bare.scaled = True\n")
    assert bare != found("mine.py:Bare")
