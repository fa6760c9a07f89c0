"""What every reward and the KL count in the advantage that the policy is trained on, for the presets of the paper."""

import pytest
import torch

from align.config import configs_dir
from align.config.resolve import resolve
from align.errors import ConfigError
from align.objectives.constraints import Constraint
from align.objectives.controllers import AdaptiveKL
from align.rollout.types import Episode
from align.trainers.core.ranks import Ranks
from align.trainers.core.recorder import Recorder
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.samples import Sample
from align.trainers.on_policy.streams import fill_advantages, mix
from align.trainers.ppo import PPO, PPOConfig
from align.trainers.weighting.base import FixedWeights, make_weighting
from align.trainers.weighting.constrained import ConstrainedWeights, RewardStreams
from align.trainers.weighting.options import ConstraintOptions
from align.trainers.weighting.updates import WeightingUpdates
from tests.trainers.tiny_runs import on_policy_config

RAW = [0.4, -0.7]
S1, S2 = torch.sigmoid(torch.tensor(RAW, dtype=torch.float64)).tolist()
KL = 0.5  # of the one token of every completion


def mixed(weighting, rewards: list[dict], beta: float, whiten: bool = False) -> torch.Tensor:
    """The mixed advantages of completions of one token [N], by the code that trains; the critic says 0."""
    samples = [Sample({"prompt_ids": [1]}, [2], "", [-1.0], False, 0, rewards=row) for row in rewards]
    for sample in samples:
        sample.ref_logps = torch.tensor([-1.0 - KL])
        sample.values = torch.zeros(1, len(weighting.streams))
    rollout = ScoredRollout(samples, [[] for _ in samples], weight_version=0)
    fill_advantages(rollout, PPO(gamma=1.0, lam=1.0, whiten_advantages=whiten), weighting, Ranks(), beta)
    return mix(torch.stack([sample.advantages for sample in samples]), weighting)[:, 0]


def make(kind, directions, task, weights, **options):
    held = [Constraint(name, direction, 0.3) for name, direction in zip("ab", directions, strict=True)]
    form = "tanh" if "equal" in directions else "sigmoid"
    return kind(["a", "b"], weights, ConstraintOptions(held, form, task, lagrangian={"initial": RAW}, **options))


ALL = {"directions": ["at_most", "at_most"], "task": ["a", "b"]}
T1, T2 = torch.tanh(torch.tensor(RAW, dtype=torch.float64)).tolist()
LEFT = 2 - S1 - S2
CASES = {  # weighting -> net weights of a, b and the KL
    "mu_ppo": (make(ConstrainedWeights, ["at_least"] * 2, None, [1.0, 1.0]), (S1, S2, LEFT)),
    "xi_ppo": (make(ConstrainedWeights, ["equal"] * 2, None, [1.0, 1.0]), (T1, T2, 2 - T1 - T2)),
    "all_ppo": (make(ConstrainedWeights, weights=[0.5, 1.0], **ALL), (0.5 * LEFT - S1, LEFT - S2, LEFT)),
    "all_ppo, kl_in_constraints": (
        make(ConstrainedWeights, weights=[0.5, 1.0], kl_in_constraints=True, **ALL),
        (0.5 * LEFT - S1, LEFT - S2, 2 - 2 * (S1 + S2)),
    ),
    "all_ppo_released": (
        make(RewardStreams, weights=[1.0, 1.0], **ALL),
        (2 - 2 * S1 - S2, 2 - S1 - 2 * S2, 4 - 3 * (S1 + S2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_net_weights(name):
    weighting, expected = CASES[name]
    nothing = {"a": 0.0, "b": 0.0}
    found = [mixed(weighting, [{**nothing, reward: 1.0}], beta=0.0).item() for reward in "ab"]
    found.append(mixed(weighting, [nothing], beta=1.0).item() / -KL)
    assert found == pytest.approx(expected, abs=1e-6)
    assert weighting.kl_weight == pytest.approx(expected[2])  # the same where the KL is in the loss


def test_released_all_ppo_standardises_the_rewards_of_its_task_apart():
    """A reward in units a hundred times larger counts the same; in one stream of the sum it decides alone."""
    torch.manual_seed(0)
    values = torch.randn(64, 2).tolist()
    small = [{"a": a, "b": b} for a, b in values]
    large = [{"a": 100 * a, "b": b} for a, b in values]
    apart = make(RewardStreams, weights=[1.0, 1.0], **ALL)
    standardised = [(column - column.mean()) / column.std() for column in torch.tensor(values).T]
    expected = (2 - 2 * S1 - S2) * standardised[0] + (2 - S1 - 2 * S2) * standardised[1]
    for rows in (small, large):
        torch.testing.assert_close(mixed(apart, rows, 0.0, whiten=True), expected, rtol=1e-4, atol=1e-4)
    together = make(ConstrainedWeights, weights=[1.0, 1.0], **ALL)
    gap = mixed(together, small, 0.0, whiten=True) - mixed(together, large, 0.0, whiten=True)
    assert gap.abs().max() > 0.1


def test_the_presets_have_these_forms():
    for preset, kind, gain in (("all_ppo", ConstrainedWeights, 0.1), ("all_ppo_released", RewardStreams, 0.1)):
        args = resolve("ppo", str(configs_dir() / f"{preset}.yaml"), []).training
        rewards = dict(zip(["meteor", "intent"], args.reward_weights, strict=True))
        weighting = make_weighting(rewards, args)
        assert type(weighting) is kind and args.kl_gain == gain
        assert weighting.kl_weight == pytest.approx(1.0)  # multipliers of 1/2


def test_a_task_of_no_reward_cannot_be_taken_apart():
    with pytest.raises(ConfigError, match="task_apart needs task_rewards"):
        make(RewardStreams, ["at_least"] * 2, None, [1.0, 1.0])


def test_a_reward_without_a_constraint_and_one_outside_the_task():
    held = [Constraint("a", "at_least", 0.3)]
    options = ConstraintOptions(held, "sigmoid", ["b"], lagrangian={"initial": [RAW[0]]})
    streams = RewardStreams(["a", "b"], [1.0, 3.0], options)
    assert streams.weights() == pytest.approx([S1, 3 * (1 - S1)])
    assert [stream.kl for stream in streams.streams] == [0.0, 1.0]
    assert streams.scores({"a": 0.1, "b": 0.2}) == {"a": 0.1, "b": 0.2}


def test_a_reward_by_the_name_of_another_stream_is_refused(tmp_path):
    """Its scores would be those of the KL's stream too, which has weight 1."""
    args = on_policy_config(PPOConfig, tmp_path, dynamic_weights={"type": "gradient"})
    with pytest.raises(ConfigError, match="a reward is called task, as another stream of GradientWeights is"):
        make_weighting({"task": 1.0, "b": 1.0}, args)


def test_a_constraint_weighs_completions_by_the_policys_tokens():
    """With `estimator: token_mean`, in conversations with an environment too."""
    seen = []

    class Weighing(FixedWeights):
        def update(self, columns, lengths):
            seen.append(lengths.tolist())
            return {}

    talk = Episode([1, 1, 0, 0, 1, 1], [], {}, 2)
    samples = [Sample({}, [5] * 6, "", [], False, 0, rewards={"r": 1.0}, episode=one) for one in (talk, None)]
    WeightingUpdates(Weighing(["r"], [1.0]), Ranks(), Recorder()).learn(samples, step=1)
    assert seen == [[4, 6]]


@pytest.mark.parametrize(("direction", "sign"), [("at_most", 1.0), ("at_least", -1.0)])
def test_a_kl_that_is_rewarded_is_said(direction, sign, caplog):
    """A cost that is held down with the KL in its stream: (1 - s) / (1 + s) of beta, which Safe-RLHF has as (1 + s) /
    (1 + s): there, and with the cost's negative held at least, the KL stays a price."""
    held = [Constraint("cost", direction, sign * 0.3)]
    options = ConstraintOptions(held, "softplus", ["a"], kl_in_constraints=True, lagrangian={"initial": 2.0})
    weighting = ConstrainedWeights(["a", "cost"], [1.0, 1.0], options)
    samples = [Sample({}, [5], "", [], False, 0, rewards={"a": 1.0, "cost": sign})]
    for kl in (True, True, False):
        updates = WeightingUpdates(weighting, Ranks(), Recorder(), kl=kl)
        for step in (1, 2):
            updates.learn(samples, step)
    s = torch.nn.functional.softplus(weighting.multipliers.raw[0]).item()
    expected = (1 - s) / (1 + s) if direction == "at_most" else 1.0
    assert weighting.kl_weight == pytest.approx(expected)
    said = [message for message in caplog.messages if "rewarded for going away" in message]
    assert [message[:6] for message in said] == (["step 1"] * 2 if direction == "at_most" else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # 8 prompts: 20 % of five times the horizon are all of beta, and of more it would be below 0
        ({"kl_horizon": 8 / 5}, "a rollout has 8 episodes, so that beta could move by 100%"),
        ({"kl_gain": 6.0}, "kl_gain is 6: beta could move by 120% after one rollout, to 0 or below"),
    ],
)
def test_beta_cannot_adapt_to_0_or_below(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        on_policy_config(PPOConfig, tmp_path, kl_target=1.0, **options)
    with pytest.raises(ConfigError, match="kl_horizon is 10, and a rollout has 50 episodes"):
        AdaptiveKL(1.0, 1.0, horizon=10).update(0.0, 50)
