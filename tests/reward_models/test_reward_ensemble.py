import logging

import pytest
import torch

from align.errors import ConfigError, RewardError
from align.reward_models.base import Reward, RewardBatch, RewardOutput
from align.reward_models.build import build_reward
from align.reward_models.classifier import ClassifierReward
from align.reward_models.ensemble import RewardEnsemble, ensemble_members, load_ensemble, save_ensemble
from align.reward_models.normalizer import Normalizer
from align.reward_models.rules import RuleReward
from align.reward_models.steps import in_step
from tests.reward_models import worlds

BATCH = RewardBatch(["w1 w2 ", "w3 ", "w4 "], ["w7", "w8 w9", "w2 w2"])


class Fixed(Reward):
    def __init__(self, *scores, name="fixed"):
        self.scores, self.name = torch.tensor(scores), name

    def _score(self, batch):
        return RewardOutput(self.scores)


def two(completions):
    return [2.0] * len(completions)


@pytest.fixture
def saved(tmp_path):
    for i in range(3):
        (tmp_path / f"member_{i}").mkdir()
        worlds.reward_folder(tmp_path / f"member_{i}", seed=i, scale=10.0**i)
    save_ensemble(tmp_path, [f"member_{i}" for i in range(3)])
    return tmp_path


def normalise(folder):
    for member in ensemble_members(folder):
        scores = ClassifierReward(str(member), normalize=False).score(BATCH).scores
        Normalizer.fit(scores, "the three").save(member)


def test_what_members_log_is_not_lost():
    """log_metric of a function, the share of checks that failed: as of the same reward outside an ensemble."""

    class Logs(Fixed):
        def _score(self, batch):
            return RewardOutput(
                self.scores,
                {"failed": torch.zeros(3)},
                metrics={"tries": [self.scores[0].item()]},
                given={"asked": [1.0]},
                columns={"said": ["x"] * 3},
            )

    ensemble = RewardEnsemble([Fixed(1.0, 0.0, 3.0), Logs(3.0, 0.0, -3.0), Logs(5.0, 0.0, 0.0)], "mean")
    output = ensemble.score(BATCH)
    assert output.metrics == {"member/1/tries": [3.0], "member/2/tries": [5.0]} and output.given == {
        "asked": [1.0, 1.0]
    }
    assert output.columns == {"member/1/said": ["x"] * 3, "member/2/said": ["x"] * 3}
    assert [name for name in output.extras if "failed" in name] == ["member/1/failed", "member/2/failed"]
    assert in_step(ensemble.steps(BATCH)).metrics == output.metrics


def odd(completion):
    return None if completion == "w8 w9" else True


def not_the_third(completions):
    return [None if text == "w2 w2" else 1.0 for text in completions]


def test_a_completion_that_a_member_failed_for_is_left_out_and_one_that_it_does_not_apply_to_is_an_error():
    masks = {"type": "verifier", "function": odd, "on_error": "mask"}
    spec = {"type": "ensemble", "aggregation": "lcb", "lambda": 1.0, "members": [masks, two]}
    ensemble = build_reward(spec)
    for output in (ensemble.score(BATCH, partial=True), in_step(ensemble.steps(BATCH, partial=True))):
        assert output.failed.tolist() == output.scores.isnan().tolist() == [False, True, False]
        assert output.scores[[0, 2]].tolist() == [1.0, 1.0] and output.extras["variance"].isnan().sum() == 1
        assert output.extras["member/0/failed"].tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(RewardError, match=r"'ensemble' has no score for rows \[1\] .*: it failed there"):
        ensemble.score(BATCH)
    some = build_reward({"type": "ensemble", "aggregation": "mean", "members": [two, not_the_third]})
    with pytest.raises(RewardError, match=r"member 'not_the_third' does not apply to rows \[2\] of the batch"):
        some.score(BATCH, partial=True)


def test_rules_and_extras():
    members = [Fixed(1.0, 0.0, 3.0), Fixed(3.0, 0.0, -3.0)]
    output = RewardEnsemble(members, "uwo", lambda_=0.5).score(BATCH)
    assert output.scores.tolist() == [1.5, 0.0, -4.5]
    assert output.extras["variance"].tolist() == [1.0, 0.0, 9.0]
    assert output.extras["members_mean"].tolist() == [2.0, 0.0, 0.0]
    assert output.extras["member/1"].tolist() == [3.0, 0.0, -3.0]
    assert RewardEnsemble(members, "wco").score(BATCH).scores.tolist() == [1.0, 0.0, -3.0]
    assert RewardEnsemble(members, "mean").score(BATCH).scores.tolist() == [2.0, 0.0, 0.0]
    assert RewardEnsemble(members, "uwo", lambda_=0.5, ddof=1).score(BATCH).scores.tolist() == [1.0, 0.0, -9.0]


def test_a_rule_of_one_s_own(tmp_path, monkeypatch):
    members = [Fixed(1.0, 0.0, 3.0), Fixed(3.0, 0.0, -3.0), Fixed(9.0, 3.0, 0.0)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def middle(scores):\n    return scores.sort(0).values[1:-1].mean(0)\n"
        "def one(scores):\n    return scores.mean()\n"
    )
    spec = {"type": "ensemble", "aggregation": "mine.py:middle", "members": members}
    for reward in (build_reward(spec), RewardEnsemble(members, lambda scores: scores.sort(0).values[1])):
        output = reward.score(BATCH)
        assert output.scores.tolist() == [3.0, 0.0, 0.0] and len(output.extras["variance"]) == 3
    with pytest.raises(RewardError, match=r"aggregation by one: from the scores \[3, 3\] .* of shape \[3\], got \[\]"):
        build_reward(spec | {"aggregation": "mine.py:one"}).score(BATCH)
    with pytest.raises(ConfigError, match="lambda belongs to uwo and lcb; by middle has none"):
        build_reward(spec | {"lambda": 0.5})
    with pytest.raises(ConfigError, match="aggregation 'mine.py:none': no function 'none' there; it has middle, one"):
        build_reward(spec | {"aggregation": "mine.py:none"})


def test_saved_ensemble(saved):
    with pytest.raises(RewardError, match="normalize is true"):
        load_ensemble(saved, "uwo", lambda_=0.5)
    raw = load_ensemble(saved, "wco", normalize=False).score(BATCH)
    assert raw.extras["member/2"].abs().max() > 10 * raw.extras["member/0"].abs().max()
    normalise(saved)
    ensemble = load_ensemble(saved, "uwo", lambda_=0.5)
    output = ensemble.score(BATCH)
    assert ensemble.name == saved.name and len(ensemble.members) == 3
    for i in range(3):
        assert output.extras[f"member/{i}"].mean().abs() < 1e-5
    torch.testing.assert_close(output.scores, output.extras["members_mean"] - 0.5 * output.extras["variance"])


def test_classifiers_on_no_common_scale_are_refused(saved):
    members = [ClassifierReward(str(member)) for member in ensemble_members(saved)]
    with pytest.raises(RewardError, match="wco compares .* member_0, member_1, member_2 have no normaliser"):
        RewardEnsemble(members, "wco")
    RewardEnsemble(members, "wco", normalize=False)
    RewardEnsemble(members, "mean")


def test_scales_are_compared_within_composites_and_in_a_mean(saved):
    """Else a raw score would have decided, or counted with its own scale, in silence."""
    first, second, _ = map(str, ensemble_members(saved))
    composite = {"type": "composite", "rewards": [{"type": "classifier", "path": first}]}
    spec = {"type": "ensemble", "members": [composite, {"type": "classifier", "path": second}]}
    Normalizer(0.5, 2.0, 3, "the three").save(second)
    with pytest.raises(ConfigError, match="wco compares .* member_0 have no normaliser"):
        build_reward({**spec, "aggregation": "wco"})
    with pytest.raises(ConfigError, match="member_1 have a normaliser and member_0 have none"):
        build_reward({**spec, "aggregation": "mean"})
    Normalizer(0.5, 2.0, 3, "the three").save(first)
    raw = build_reward({**spec, "aggregation": "wco", "normalize": False}).score(BATCH).scores
    fitted = build_reward({**spec, "aggregation": "wco"}).score(BATCH).scores
    torch.testing.assert_close(fitted, (raw - 0.5) / 2)
    nested = {"type": "ensemble", "aggregation": "mean", "members": [spec | {"aggregation": "wco"}] * 2}
    torch.testing.assert_close(build_reward(nested).score(BATCH).scores, fitted)
    torch.testing.assert_close(build_reward({**nested, "normalize": False}).score(BATCH).scores, raw)


def test_a_member_that_fails_is_named():
    with pytest.raises(RewardError, match="'b' returned a non-finite score"):
        RewardEnsemble([Fixed(1, 2, 3, name="a"), Fixed(1, float("nan"), 3, name="b")], "mean").score(BATCH)
    with pytest.raises(RewardError, match="reward 'rm': .*at least two members"):
        RewardEnsemble([Fixed(1)], "uwo", lambda_=1, name="rm")
    with pytest.raises(RewardError, match="needs lambda"):
        RewardEnsemble([Fixed(1), Fixed(2)])


def test_damaged_folders(saved, tmp_path):
    with pytest.raises(RewardError, match="is not a saved ensemble"):
        ensemble_members(saved / "member_0")
    (saved / "member_1").rename(saved / "gone")
    with pytest.raises(RewardError, match="names members that are not there: .*member_1"):
        ensemble_members(saved)
    with pytest.raises(RewardError, match="has no folder member_1"):
        save_ensemble(saved, ["member_0", "member_1"])


# ---- build_reward


def test_a_member_that_is_listed_twice_is_reported(saved, caplog):
    """A path that was copied and not changed makes the members agree."""
    logging.getLogger("align").propagate = True
    members = [str(saved / name) for name in ("member_0", "member_1", "member_1")]
    build_reward({"type": "ensemble", "aggregation": "mean", "members": members})
    (said,) = [record.getMessage() for record in caplog.records if "agrees with itself" in record.getMessage()]
    assert said.startswith(members[1])


def test_a_folder_that_ensemble_json_names_twice_is_reported(saved, caplog):
    logging.getLogger("align").propagate = True
    normalise(saved)
    save_ensemble(saved, ["member_0", "member_1", "member_0"])
    build_reward({"type": "ensemble", "aggregation": "wco", "path": str(saved)})
    (said,) = [record.getMessage() for record in caplog.records if "agrees with itself" in record.getMessage()]
    assert said.startswith(str(saved / "member_0"))


def three(completions, more=0):
    return [3.0 + more] * len(completions)


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ([two, two, three], "two"),
        ([{"type": "rule", "function": two, "name": "a"}, {"type": "rule", "function": two, "name": "b"}], "a"),
        ([f"{__name__}:two", f"{__name__}:two"], "two"),
        ([{"type": "length", "maximum": 4, "margin": 4}] * 2, "length"),
        ([Fixed(1.0, name="mine")] * 2, "mine"),
        ([{"type": "remote", "url": "http://127.0.0.1:1/", "name": name} for name in "ab"], "a"),
        ([two, three, {"type": "rule", "function": three, "arguments": {"more": 1}}], None),
        ([Fixed(1.0, name="mine"), Fixed(1.0, name="mine")], None),
        ([{"type": "remote", "url": f"http://127.0.0.1:{port}/"} for port in (1, 2)], None),
    ],
)
def test_members_of_any_kind_that_are_one_reward_are_reported(members, named, caplog):
    logging.getLogger("align").propagate = True
    build_reward({"type": "ensemble", "aggregation": "mean", "members": members})
    said = [record.getMessage() for record in caplog.records if "agrees with itself" in record.getMessage()]
    assert [text.split(" is several")[0] for text in said] == ([] if named is None else [named])


def test_build(saved):
    normalise(saved)
    member = str(saved / "member_0")
    assert isinstance(build_reward(member), ClassifierReward) and build_reward(member).normalized
    assert build_reward({"type": "classifier", "path": member, "name": "helpful"}).name == "helpful"
    assert isinstance(build_reward(f"{__name__}:two"), RuleReward)
    assert build_reward({"type": "rule", "function": f"{__name__}:two", "name": "b"}).name == "b"
    assert build_reward(two).name == "two"
    fixed = Fixed(1.0)
    assert build_reward(fixed) is fixed
    mixed = build_reward(
        {"type": "ensemble", "name": "rm", "aggregation": "uwo", "lambda": 0.5, "members": [member, f"{__name__}:two"]}
    )
    assert mixed.name == "rm" and mixed.score(BATCH).extras["member/1"].tolist() == [2.0, 2.0, 2.0]
    whole = build_reward({"type": "ensemble", "path": str(saved), "aggregation": "wco"})
    assert len(whole.members) == 3 and all(m.normalized for m in whole.members)
    raw = build_reward({"type": "ensemble", "path": str(saved), "aggregation": "wco", "normalize": False})
    assert not any(m.normalized for m in raw.members)
    assert build_reward(member, tokenizer=worlds.tokenizer()).shares_ids


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"type": "classifer", "path": "x"},
            "type must be one of .*ensemble, .*; nearest valid: classifier",
        ),
        ({"path": "x"}, "type must be one of"),
        ({"type": "classifier", "pth": "x"}, "unknown key reward.pth of a classifier reward; nearest valid: path"),
        ({"type": "classifier", "name": "x"}, "needs 'path'"),
        (
            {"type": "rule", "function": "nowhere:f", "zz": 1},
            "unknown key reward.zz of a rule reward; valid: function, ",
        ),
        ({"type": "ensemble", "aggregation": "mean"}, "either members .* or path"),
        ({"type": "ensemble", "members": ["a:b"]}, "needs 'aggregation'"),
        ({"type": "ensemble", "aggregation": "mean", "members": {}}, "members: input should be a valid list"),
        ({"type": "ensemble", "aggregation": "uwo", "members": ["json:dumps"] * 2}, "needs lambda"),
        ("", "a reward is empty"),
        (3, "a mapping or a text, got int"),
        ("/nowhere/at/all", "cannot load"),
    ],
)
def test_specs_that_describe_nothing(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_reward(spec)
    assert "\n" not in str(caught.value)


def test_an_ensemble_folder_is_no_classifier(saved):
    with pytest.raises(ConfigError, match="holds an ensemble: write {type: ensemble"):
        build_reward(str(saved))
