"""The table of losses: what a configuration may say of them, and losses of the user's own."""

import pytest
import torch

from align.errors import ConfigError
from align.objectives.preference import LOSSES, MODIFIERS, register_loss
from align.objectives.preference_objective import RANGES, preference_objective
from tests.objectives.pair_cases import pair_of, random_pairs

TRL = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
).split()


def test_every_loss_of_trl_is_there():
    assert set(TRL) <= set(LOSSES)


def test_every_option_has_a_range_and_a_default():
    for name, loss in LOSSES.items():
        assert set(loss.defaults) <= set(RANGES), name
        preference_objective(name, None, dict(loss.defaults))  # the defaults are valid
        assert not set(loss.modifiers) & set(loss.unaffected) and {*loss.modifiers, *loss.unaffected} <= set(MODIFIERS)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_asks_for_all_that_it_looks_at(name):
    """Without what the table says it does not need, the loss is the same."""
    objective, pairs = preference_objective(name), random_pairs()
    expected = objective(pairs).losses
    if not objective.needs_reference:
        pairs.ref_chosen = pairs.ref_rejected = None
    if not objective.needs_kl:
        pairs.chosen_kl = pairs.rejected_kl = None
    assert torch.equal(objective(pairs).losses, expected)
    assert all(values.isfinite().all() for values in objective(pairs).rewards)
    if not objective.needs_mean_length:
        pairs.mean_chosen_length = torch.tensor(1e6)
        assert torch.equal(objective(pairs).losses, expected)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.needs_mean_length])
def test_which_losses_look_across_pairs(name):
    """The loss of a pair among others and alone; beta-DPO looks across pairs in its drawing."""
    objective, pairs, other = preference_objective(name), random_pairs(seed=0), random_pairs(seed=1)
    fields = ("ref_chosen", "ref_rejected", "chosen", "rejected", "chosen_kl", "rejected_kl")
    changed = random_pairs(seed=0)
    for field in fields:
        values = getattr(changed, field).detach().clone()
        values[1:] = getattr(other, field)[1:]
        setattr(changed, field, values)
    same = torch.equal(objective(pairs).losses[:1], objective(changed).losses[:1])
    assert same == (not objective.across_pairs) or objective.states


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sigmod",), "loss_type 'sigmod' is unknown; nearest: 'sigmoid'"),
        ((["sigmoid", "tdpo"],), "'tdpo' is unknown; nearest: 'tdpo"),
        (([],), "names no loss"),
        ((["sft", "sft"],), "sft twice"),
        ((["sigmoid", "sft"], [1.0]), "1 entries for 2 losses"),
        ((["sigmoid", "sft"], [1.0, 0.0]), "leave out"),
        ((["sigmoid", "sft"], [1.0, float("nan")]), "finite"),
        (("sigmoid", None, {"label_smoothing": 0.1}), "label_smoothing would be ignored by sigmoid; .*cdpo, robust"),
        (("cdpo", None, {"discopop_tau": 0.06}), "discopop_tau would be ignored"),
        (("ipo", None, {"simpo_gamma": 1.0}), "simpo_gamma would be ignored by ipo; .*simpo"),
        (("tdpo1", None, {"tdpo_alpha": 0.7}), "tdpo_alpha would be ignored by tdpo1; .*tdpo2"),
        (("sft", None, {"beta": 0.1}), "beta would be ignored by sft"),
        (("sigmoid", None, {"lable_smoothing": 0.1}), "no loss knows it; nearest: label_smoothing"),
        (("nca_pair", None, {"f_divergence_type": "js_divergence"}), "cannot be used with nca_pair"),
        ((["sigmoid", "nca_pair"], None, {"f_divergence_type": "js_divergence"}), "cannot be used with nca_pair"),
        (("sft", None, {"f_divergence_type": "js_divergence"}), "would be ignored by sft"),
        (("simpo", None, {"f_divergence_type": "js_divergence"}), "would be ignored by simpo"),
        (("sigmoid", None, {"f_divergence_type": "kl"}), "f_divergence_type must be one of reverse_kl"),
        (("sigmoid", None, {"f_alpha_divergence_coef": 0.5}), "with f_divergence_type: alpha_divergence only"),
        (("aot", None, {"use_weighting": True}), "use_weighting: True cannot be used with aot"),
        (("simpo", None, {"ld_alpha": 0.5}), "ld_alpha: 0.5 cannot be used with simpo"),
        (("sft", None, {"ld_alpha": 0.5}), "would be ignored by sft"),
        (("sigmoid", None, {"ld_alpha": 1.5}), r"ld_alpha must be in \[0, 1\]"),
        (("sigmoid", None, {"beta": 0.0}), "beta must be > 0"),
        (("sigmoid", None, {"beta": float("nan")}), "beta must be > 0"),
        (("robust", None, {"label_smoothing": 0.5}), r"in \[0, 0.5\)"),
        (("exo_pair", None, {"label_smoothing": 0.0}), "must be > 0 for exo_pair"),
        ((["sigmoid", "simpo"],), "their defaults differ .*sigmoid 0.1, simpo 2.0"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        preference_objective(*arguments)


def test_what_is_used_is_not_an_error():
    """Options that one loss of the list uses, modifiers that leave another as it is, values that ask for nothing."""
    preference_objective(["sigmoid", "robust", "sft"], None, {"beta": 0.2, "label_smoothing": 0.2, "ld_alpha": 0.5})
    preference_objective(["sigmoid", "sft"], None, {"f_divergence_type": "js_divergence", "use_weighting": True})
    preference_objective("simpo", None, {"f_divergence_type": "reverse_kl", "use_weighting": False, "ld_alpha": None})
    given = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
    objective = preference_objective("sigmoid", None, given)
    rho = torch.tensor([1.0], dtype=torch.float64)
    torch.testing.assert_close(objective.divergence(rho), (torch.exp(-0.7 * rho) - 1) / -0.7)


def test_a_mix_is_the_weighted_sum_with_its_own_options():
    pairs = random_pairs()
    mix = preference_objective(["robust", "hinge"], [0.25, 2.0], {"beta": 0.3, "label_smoothing": 0.2})
    alone = [
        preference_objective("robust", None, {"beta": 0.3, "label_smoothing": 0.2})(pairs).losses,
        preference_objective("hinge", None, {"beta": 0.3})(pairs).losses,
    ]
    torch.testing.assert_close(mix(pairs).losses, 0.25 * alone[0] + 2.0 * alone[1])
    assert preference_objective("simpo").terms[0].options == {"beta": 2.0, "simpo_gamma": 1.0}


def test_rewards_are_scaled_by_the_beta_that_is_used():
    pairs = random_pairs()
    assert torch.equal(preference_objective(["sft", "sigmoid"])(pairs).rewards[0], 0.1 * pairs.chosen_ratio.detach())
    simpo = preference_objective("simpo")(pairs).rewards[1]
    torch.testing.assert_close(simpo, 2.0 * pairs.rejected.detach() / pairs.rejected_length)
    assert not simpo.requires_grad
    assert torch.equal(preference_objective("cpo")(pairs).rewards[0], 0.1 * pairs.chosen_ratio.detach())
    pairs.ref_chosen = pairs.ref_rejected = None
    assert torch.equal(preference_objective("sft")(pairs).rewards[0], pairs.chosen.detach())


@pytest.fixture
def table():
    before = dict(LOSSES)
    yield LOSSES
    LOSSES.clear()
    LOSSES.update(before)


def test_a_loss_of_one_s_own(table):
    @register_loss("focal", modifiers=MODIFIERS)
    def focal(pairs, *, beta=0.1, focal_gamma=2.0):
        p = torch.sigmoid(beta * pairs.delta)
        return -((1 - p) ** focal_gamma) * p.log()

    pairs = pair_of(3.0)
    losses = preference_objective("focal", None, {"focal_gamma": 0.0})(pairs).losses
    torch.testing.assert_close(losses, preference_objective("sigmoid")(pairs).losses)
    with pytest.raises(ConfigError, match="focal_gamma would be ignored by sigmoid; the losses that use it: focal"):
        preference_objective("sigmoid", None, {"focal_gamma": 1.0})
    preference_objective(["focal", "sigmoid"], None, {"f_divergence_type": "js_divergence"})


def test_a_loss_of_one_s_own_without_a_default_beta(table):
    register_loss("linear", lambda pairs, *, beta: -beta * pairs.chosen, needs_reference=False)
    with pytest.raises(ConfigError, match="set beta: linear has no default"):
        preference_objective("linear")
    assert not preference_objective("linear", None, {"beta": 1.0}).needs_reference


@pytest.mark.parametrize(
    ("name", "function", "options", "message"),
    [
        ("sigmoid", lambda pairs: pairs.delta, {}, "there is a loss 'sigmoid' already"),
        ("mine", lambda pairs, beta: pairs.delta, {}, "by keyword only"),
        ("mine", lambda *, beta: beta, {}, "by keyword only"),
        ("mine", lambda pairs, *, ld_alpha=0.1: pairs.delta, {}, "ld_alpha mean something else"),
        ("mine", lambda pairs: pairs.delta, {"modifiers": ("ld",)}, "unknown modifiers"),
    ],
)
def test_a_loss_that_does_not_fit(table, name, function, options, message):
    with pytest.raises(ConfigError, match=message):
        register_loss(name, function, **options)
    assert table["sigmoid"].function is not function and "mine" not in table


@pytest.mark.parametrize("name, option", [
    ("sigmoid", {"label_smoothing": 0.0}), ("sigmoid", {"discopop_tau": 0.05, "beta_dpo_preset": "corrected"}),
    ("simpo", {"label_smoothing": 0.0, "tdpo_alpha": 0.5}),
])  # fmt: skip
def test_defaults_and_neutral_values_written_out_change_nothing(name, option):
    (term,) = preference_objective(name, None, option).terms
    assert term.options == preference_objective(name).terms[0].options
