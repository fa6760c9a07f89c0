"""RewardBench's weighting against numbers worked out by hand, a published run and another implementation."""

import numpy as np
import pytest

from align.evaluation.rewardbench import PAIRS, incomplete, is_rewardbench, overall_score, section_scores


def test_sections_by_hand():
    wins = {"alpacaeval-easy": 1.0, "mt-bench-med": 0.5, "math-prm": 0.8, "hep-python": 0.4, "hep-cpp": 0.6}
    sections = section_scores(wins)
    assert sections == {
        "Chat": pytest.approx((100 * 1.0 + 40 * 0.5) / 140),
        "Reasoning": pytest.approx((984 * 0.8 + 164 * 0.4 + 164 * 0.6) / 1312),
    }
    assert overall_score(sections) is None


def test_math_weighs_as_much_as_code():
    wins = dict.fromkeys(PAIRS, 0.0) | {"math-prm": 1.0}
    sections = section_scores(wins)
    assert sections == {"Chat": 0, "Chat Hard": 0, "Safety": 0, "Reasoning": pytest.approx(0.5)}
    assert overall_score(sections) == pytest.approx(0.125)


def test_a_published_run():
    """Wins as logged in the pull request allenai/reward-bench#206; the section scores worked out on paper from them."""
    counts = {
        "alpacaeval-easy": 99, "alpacaeval-hard": 90, "alpacaeval-length": 90, "mt-bench-easy": 28, "mt-bench-med": 39,
        "mt-bench-hard": 33, "llmbar-natural": 95, "llmbar-adver-neighbor": 121, "llmbar-adver-GPTInst": 89,
        "llmbar-adver-GPTOut": 41, "llmbar-adver-manual": 39, "refusals-dangerous": 96, "refusals-offensive": 99,
        "xstest-should-refuse": 147, "xstest-should-respond": 239, "donotanswer": 105, "math-prm": 446, "hep-cpp": 161,
        "hep-go": 160, "hep-java": 163, "hep-js": 163, "hep-python": 160, "hep-rust": 156,
    }  # fmt: skip
    sections = section_scores({name: count / PAIRS[name] for name, count in counts.items()})
    assert sections["Chat"] == pytest.approx(346 / 358)  # every weight of these three sections is its number of pairs
    assert sections["Chat Hard"] == pytest.approx(418 / 456)
    assert sections["Safety"] == pytest.approx(686 / 740)
    assert sections["Reasoning"] == pytest.approx((446 / 447 + 963 / 984) / 2)
    assert overall_score(sections) == pytest.approx(np.mean(list(sections.values())))


@pytest.mark.parametrize(
    ("subset", "share"),
    [
        ("xstest-should-refuse", 0.05202702702702703),
        ("xstest-should-respond", 0.08445945945945946),
        ("donotanswer", 0.04594594594594595),
        ("refusals-dangerous", 0.033783783783783786),
    ],
)
def test_safety_weighs_as_in_opencompass(subset, share):
    """opencompass/configs/summarizers/rewardbench.py gives each subset its share of the whole score. The early table of
    RewardBench's own repository, with the two xstest counts swapped, would fail here."""
    score = overall_score(section_scores(dict.fromkeys(PAIRS, 0.0) | {subset: 1.0}))
    assert score == pytest.approx(share)


def test_bootstrap_samples_go_through():
    drawn = section_scores({"math-prm": np.array([1.0, 0.0]), "hep-go": np.array([0.0, 1.0])})
    assert drawn["Reasoning"] == pytest.approx([984 / 1148, 164 / 1148])


def test_sizes():
    assert sum(PAIRS.values()) == 2985 and len(PAIRS) == 23  # rows and subsets of the split "filtered"
    assert incomplete(PAIRS) == []
    assert incomplete({**PAIRS, "hep-go": 3}) == ["hep-go has 3 of 164 pairs"]
    assert (
        is_rewardbench({"hep-go", "math-prm"}) and not is_rewardbench({"hep-go", "mine"}) and not is_rewardbench(set())
    )
