"""What a reward counts for in a checkpoint, where some of it cannot be read: locks, connections, servers."""

import re
import sys
from threading import Lock

import numpy as np
import pytest

from align.errors import RewardError
from align.modeling.fingerprint import fingerprint, mark
from align.reward_models.base import Reward, RewardOutput
from align.reward_models.build import build_reward
from align.reward_models.judge_server import ServerJudge
from align.reward_models.judges import JudgeReward
from align.reward_models.rules import RuleReward
from tests.reward_models import worlds

REMOTE = {"type": "remote", "url": "http://a.test:1/score"}


def words(completions, **columns) -> list[float]:
    return [float(len(text.split())) for text in completions]


class Guarded(Reward):
    """With a lock, and settings beside it."""

    def __init__(self, scale: float = 1.0, **more):
        self.name, self.scale, self.lock = "guarded", scale, Lock()
        vars(self).update(more)

    def _score(self, batch):
        return RewardOutput([self.scale] * len(batch))


def composite(weight: float = 1.0, first=REMOTE):
    return build_reward({"type": "composite", "rewards": [first, words], "weights": weights_of(first, weight)})


def weights_of(first, weight: float) -> dict:
    return {"remote" if isinstance(first, dict) else first.name: weight, "words": 1.0}


def test_a_part_that_cannot_be_read_hides_no_other():
    """A whole reward counted by its kind then: another weight, another file and another model were taken for it."""
    assert mark(composite()) == mark(composite()) != mark(composite(2.0))
    assert mark(composite(first=Guarded())) == mark(composite(first=Guarded())) != mark(composite(first=Guarded(2.0)))
    ensembles = [
        build_reward({"type": "ensemble", "aggregation": "lcb", "lambda": rate, "members": [Guarded(), Guarded(2.0)]})
        for rate in (0.1, 0.1, 0.2)
    ]
    assert mark(ensembles[0]) == mark(ensembles[1]) != mark(ensembles[2])
    with pytest.raises(RewardError, match="a lock has no fingerprint"):
        fingerprint(Guarded())


def test_what_can_be_read():
    def rule(pattern, values):
        return RuleReward(lambda completions: [len(pattern.findall(c)) * values[0] for c in completions], name="rule")

    first, again, *others = (
        fingerprint(rule(re.compile(pattern), np.array(values)))
        for pattern, values in (("a", [1.0]), ("a", [1.0]), ("b", [1.0]), ("a", [2.0]), ("a", [[1.0]]))
    )
    assert first == again and len({first, *others}) == 4


def test_a_server_counts_by_what_it_is_asked():
    """Not by where it is, and how patiently it is asked."""
    elsewhere = {**REMOTE, "url": "http://b.test:2/score", "timeout": 5.0, "concurrency": 9, "headers": {"key": "x"}}
    first = mark(build_reward(REMOTE))
    assert first == mark(build_reward(elsewhere))
    for change in ({"columns": ["answer"]}, {"url": "http://a.test:1/other"}):
        assert first != mark(build_reward(REMOTE | change))
    with pytest.raises(RewardError, match="has no fingerprint"):  # its scores are not kept: nothing tells its model
        fingerprint(build_reward(REMOTE))


def test_a_judge_counts_by_its_model_and_its_question(tmp_path):
    def judge(model="judge", **options):
        return mark(JudgeReward(ServerJudge("http://a.test:1/v1/chat/completions", model, **options), name="judge"))

    (tmp_path / "question.txt").write_text("{prompt} {first} {second}")
    assert judge() == judge(timeout=3.0)
    assert len({judge(), judge("other"), judge(max_tokens=9), judge(template=str(tmp_path / "question.txt"))}) == 4


RULES = """
import threading
class Rule:
    def __init__(self, lock): self.lock = lock
    def __call__(self, completions): return [1.0 for _ in completions]
rule, guarded = Rule(None), Rule(threading.Lock())
"""


@pytest.mark.parametrize(("name", "digest"), [("rule", fingerprint), ("rule", mark), ("guarded", mark)])
def test_an_object_of_a_file_follows_its_text(name, digest, tmp_path, monkeypatch):
    """Python finds no source of a class whose module was not imported by name: none was in the digest."""
    monkeypatch.chdir(tmp_path)
    found = []
    for text in (RULES, RULES, RULES.replace("1.0", "2.0")):
        (tmp_path / "rules.py").write_text(text)
        found.append(digest(RuleReward("rules.py:" + name)))
    assert found[0] == found[1] != found[2]


def test_a_class_counts_by_its_own_file_where_another_module_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "rules", worlds)
    test_an_object_of_a_file_follows_its_text("rule", mark, tmp_path, monkeypatch)


def test_a_cell_of_a_notebook_counts_by_its_code():
    """Not by the name that it has in this session."""

    def found(cell: str, text: str) -> str:
        names: dict = {}
        exec(compile(text, cell, "exec"), names)
        return mark(RuleReward(names["rule"]))

    text = "def rule(completions): return [float(c in {'a', 'b'}) for c in completions]"
    first = found("/tmp/ipykernel_1/5.py", text)
    assert first == found("/tmp/ipykernel_2/5.py", text) != found("/tmp/ipykernel_1/5.py", text.replace("'b'", "'c'"))
