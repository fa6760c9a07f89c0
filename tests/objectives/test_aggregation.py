import pytest
import torch

from align.errors import RewardError
from align.objectives.ensemble import aggregate
from align.objectives.reward_model import bradley_terry_loss, centering, score_l2

SCORES = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]])


def test_rules_by_hand():
    assert aggregate(SCORES, "mean").scores.tolist() == [3.0, 2.0]
    assert aggregate(SCORES, "wco").scores.tolist() == [1.0, 0.0]
    population = aggregate(SCORES, "uwo", lambda_=0.75)
    assert population.variance.tolist() == pytest.approx([8 / 3, 8.0])
    assert population.scores.tolist() == pytest.approx([1.0, -4.0])
    assert aggregate(SCORES, "uwo", lambda_=0.5, ddof=1).scores.tolist() == pytest.approx([1.0, -4.0])
    assert aggregate(SCORES, "wco", ddof=1).variance.tolist() == [4.0, 12.0]


def test_lower_confidence_bound_and_quantiles():
    bound = aggregate(SCORES, "lcb", lambda_=0.5)
    assert bound.scores.tolist() == pytest.approx([3 - 0.5 * (8 / 3) ** 0.5, 2 - 0.5 * 8**0.5])
    assert aggregate(SCORES, "lcb", lambda_=0.5, ddof=1).scores.tolist() == pytest.approx([2.0, 2 - 0.5 * 12**0.5])
    for rule, quantile in (("wco", 0.0), ("mean", 0.5)):  # in the first column the median is the mean
        assert aggregate(SCORES, "quantile", quantile=quantile).scores[0] == aggregate(SCORES, rule).scores[0]
    assert aggregate(SCORES, "quantile", quantile=0.75).scores.tolist() == [4.0, 3.0]


def test_lambda_zero_is_zero_and_not_a_default():
    assert torch.equal(aggregate(SCORES, "uwo", lambda_=0).scores, aggregate(SCORES, "mean").scores)


def test_one_member():
    one = aggregate(SCORES[:1], "mean")
    assert one.scores.tolist() == [1.0, 0.0] and one.variance is None
    assert aggregate(SCORES[:1], "quantile", quantile=0.3).scores.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (SCORES[:1], {"rule": "uwo", "lambda_": 0.1}, "at least two members"),
        (SCORES[:1], {"rule": "mean", "ddof": 1}, "more than 1 member"),
        (SCORES, {"rule": "uwo"}, "needs lambda"),
        (SCORES, {"rule": "uwo", "lambda_": -1.0}, "must be >= 0"),
        (SCORES, {"rule": "mean", "lambda_": 0.5}, "would be ignored"),
        (SCORES, {"rule": "median"}, "one of mean, wco .the worst case., uwo"),
        (SCORES[:1], {"rule": "lcb", "lambda_": 0.1}, "at least two members"),
        (SCORES, {"rule": "lcb"}, "lcb needs lambda, the weight of the standard deviation"),
        (SCORES, {"rule": "uwo", "lambda_": float("nan")}, "must be >= 0"),
        (SCORES, {"rule": "lcb", "lambda_": float("inf")}, "must be >= 0 and finite"),
        (SCORES, {"rule": "quantile"}, "needs quantile"),
        (SCORES, {"rule": "quantile", "quantile": 1.5}, "in \\[0, 1\\], got 1.5"),
        (SCORES, {"rule": "quantile", "quantile": 0.2, "lambda_": 0.5}, "quantile has none"),
        (SCORES, {"rule": "wco", "quantile": 0.2}, "would be ignored"),
        (SCORES, {"rule": "mean", "ddof": 2}, "ddof must be 0"),
        (SCORES[0], {"rule": "mean"}, "must be \\[members, completions\\]"),
    ],
)
def test_errors(scores, options, message):
    with pytest.raises(RewardError, match=message):
        aggregate(scores, **options)


def test_reward_model_losses():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])
    assert bradley_terry_loss(chosen, rejected)[0].item() == pytest.approx(0.693147)
    assert bradley_terry_loss(chosen, rejected, margin=torch.tensor([0.0, -2.0])).tolist() == pytest.approx(
        [0.693147] * 2
    )
    assert score_l2(chosen, rejected).tolist() == [1.0, 2.0]
    assert centering(chosen, rejected).tolist() == [4.0, 4.0]
    assert bradley_terry_loss(torch.tensor([-200.0]), torch.tensor([200.0])).item() == 400.0
