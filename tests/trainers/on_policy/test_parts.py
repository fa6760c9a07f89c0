"""The parts of the on-policy loop, each alone: no trainer is made here."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from align.errors import ConfigError, RolloutError, TrainingError
from align.modeling.load import reference_of
from align.modeling.logprobs import token_logps
from align.objectives.constraints import Constraint
from align.rollout.transformers_engine import TransformersEngine
from align.rollout.types import SamplingParams
from align.trainers.core.ranks import Ranks
from align.trainers.core.recorder import Recorder
from align.trainers.grpo import GRPO
from align.trainers.on_policy.batches import BatchPlanner
from align.trainers.on_policy.buffer import RolloutBuffer
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.critic import CriticLearner
from align.trainers.on_policy.engine import SyncedEngine
from align.trainers.on_policy.estimators import Estimate, Estimator, make_estimator, register_estimator
from align.trainers.on_policy.evaluation import PolicyEvaluator
from align.trainers.on_policy.forward import ForwardPasses
from align.trainers.on_policy.kl_coefficient import KLCoefficient
from align.trainers.on_policy.pipeline import RolloutPipeline
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.samples import scatter
from align.trainers.on_policy.streams import Stream, fill_advantages, make_streams, mix
from align.trainers.ppo import PPO, PPOConfig
from align.trainers.reinforce_pp import ReinforcePP
from align.trainers.remax import ReMax, ReMaxConfig
from align.trainers.rloo import RLOO, RLOOConfig
from align.trainers.weighting.base import FixedWeights, StreamSpec
from align.trainers.weighting.constrained import ConstrainedWeights
from align.trainers.weighting.dynamic import GradientWeights
from align.trainers.weighting.options import ConstraintOptions
from align.trainers.weighting.sections import GradientSection
from tests.trainers.tiny_runs import QUIET, on_policy_config, prompts, tiny_model, wanted_words

ALONE = Ranks()


# ---- estimators -----------------------------------------------------------------------------------------------------


def stream(scores, beta=0.0, extra=None, values=None) -> Stream:
    """Four samples of two prompts; log-probs that are 0.1 (a token) above the reference's."""
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    return Stream("task", torch.tensor(scores), extra, beta, -1.0 * mask, -1.1 * mask, mask, values)


def test_estimators_by_hand():
    scores = [1.0, 0.0, 3.0, 1.0]
    column = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    mask = stream(scores).mask
    torch.testing.assert_close(RLOO(num_generations=2).estimate(stream(scores), ALONE).advantages, column * mask)
    found = GRPO(num_generations=2, scale_rewards="none").estimate(stream([2.0, 2.0, 3.0, 1.0]), ALONE)
    torch.testing.assert_close(found.advantages, torch.tensor([[0.0], [0.0], [1.0], [-1.0]]) * mask)
    assert found.metrics == {"groups/task_without_variance": [0.5]} and found.returns is None
    remax = ReMax(num_generations=2, kl_mode="none", gamma=1.0, reward_clip=None)
    greedy = stream(scores, extra=torch.tensor([[0.5], [2.0]]))
    expected = torch.tensor([[0.5], [-0.5], [1.0], [-1.0]]) * mask
    torch.testing.assert_close(remax.estimate(greedy, ALONE).advantages, expected)
    whitened = ReinforcePP(num_generations=1, group_baseline=False, gamma=1.0).estimate(stream(scores), ALONE)
    tokens = whitened.advantages[mask.bool()]
    assert tokens.mean().abs() < 1e-6 and tokens.std() == pytest.approx(1, abs=1e-5)


def test_the_kl_is_a_part_of_the_score():
    found = RLOO(num_generations=2).estimate(stream([1.0, 1.0, 1.0, 1.0], beta=2.0), ALONE)  # KL 0.1 a token
    column = torch.tensor([-0.2, 0.2, 0.4, -0.4])[:, None]
    torch.testing.assert_close(found.advantages, column * stream([0.0] * 4).mask)


def test_a_critic_that_is_right_leaves_no_advantage():
    given = stream([1.0, 0.0, 3.0, 1.0])
    given.values = given.scores[:, None] * given.mask
    found = PPO(gamma=1.0, lam=0.9, whiten_advantages=False).estimate(given, ALONE)
    torch.testing.assert_close(found.advantages, torch.zeros(4, 3))
    torch.testing.assert_close(found.returns, given.values)
    assert found.metrics == {"critic/explained_variance/task": [1.0]}


@pytest.mark.parametrize("value", [0.1, 0.35, 1e6 + 0.1, -3e5])
def test_equal_scores_give_exactly_no_advantage(value):
    """Of the group, and of the whole rollout: rounding is not divided by a deviation of next to nothing."""
    greedy, equal = torch.full((2, 1), value), [value] * 4
    for estimator in (
        RLOO(num_generations=2),
        *(GRPO(num_generations=2, scale_rewards=scale) for scale in ("group", "batch", "none")),
        ReMax(num_generations=2, kl_mode="to_go", gamma=0.9, reward_clip=None),
        *(ReinforcePP(num_generations=2, group_baseline=baseline, gamma=1.0) for baseline in (False, True)),
        PPO(gamma=1.0, lam=1.0, whiten_advantages=True),
    ):
        given = stream(equal, extra=greedy, values=torch.zeros(4, 3))
        assert not estimator.estimate(given, ALONE).advantages.any(), estimator
    seven_of_eight = torch.tensor([value] * 7 + [value + 1.0])  # one that differs is seen
    given = Stream("task", seven_of_eight, None, 0.0, *(torch.zeros(8, 1),) * 2, torch.ones(8, 1))
    found = GRPO(num_generations=8, scale_rewards="group").estimate(given, ALONE).advantages
    assert found[7] > 2 and found[:7].max() < 0


def test_estimating_changes_nothing():
    """Neither the stream nor the estimator."""
    estimator, given = ReMax(2, "to_go", 0.9, 0.5), stream([1.0, 0.0, 3.0, 1.0], 0.1, torch.tensor([[0.5], [2.0]]))
    before = {name: value.clone() for name, value in vars(given).items() if isinstance(value, torch.Tensor)}
    first, second = (estimator.estimate(given, ALONE).advantages for _ in range(2))
    assert torch.equal(first, second) and all(torch.equal(vars(given)[name], old) for name, old in before.items())


@dataclass
class Sharp(Estimator):
    """Reads an option of the configuration, and one that only some have."""

    temperature: float
    sharpness: float = 2.0

    def estimate(self, stream, ranks):
        return Estimate(stream.scores[:, None] * stream.mask)


@dataclass
class Blunt(Sharp):
    bluntness: float = field(kw_only=True)


@dataclass
class SharpConfig(OnPolicyConfig):
    sharpness: float = 3.0


def test_an_estimator_is_found_by_its_name_and_reads_its_options(tmp_path):
    from align.trainers.on_policy.estimators import ESTIMATORS

    register_estimator("sharp", Sharp)
    register_estimator("blunt")(Blunt)
    try:
        plain = make_estimator(on_policy_config(OnPolicyConfig, tmp_path, estimator="sharp", temperature=0.5))
        assert (plain.temperature, plain.sharpness) == (0.5, 2.0)
        assert make_estimator(on_policy_config(SharpConfig, tmp_path, estimator="sharp")).sharpness == 3.0
        with pytest.raises(ConfigError, match="estimator 'blunt' reads bluntness, which SharpConfig does not have"):
            on_policy_config(SharpConfig, tmp_path, estimator="blunt")
        with pytest.raises(ConfigError, match="there is an estimator 'sharp' already"):
            register_estimator("sharp", Blunt)
        with pytest.raises(ConfigError, match="unknown estimator 'sharb', did you mean 'sharp'"):
            on_policy_config(RLOOConfig, tmp_path, estimator="sharb")
    finally:
        del ESTIMATORS["sharp"], ESTIMATORS["blunt"]
    with pytest.raises(ConfigError, match="must be a subclass of Estimator"):
        register_estimator("a function", lambda stream: stream.scores)
    with pytest.raises(ConfigError, match="is no subclass of Estimator"):
        on_policy_config(RLOOConfig, tmp_path, estimator="datetime:date")
    assert not RLOOConfig(**QUIET).whitens and PPOConfig(**QUIET).whitens


def test_the_kl_coefficient_follows_by_share_or_by_gain(tmp_path):
    """A KL of twice the target: 20 % of the rollout's share of the horizon, or of the gain."""
    far = torch.full((50,), 2.0)
    for options, expected in (({"horizon": 100}, 1.1), ({"gain": 0.1}, 1.02), ({"horizon": 100, "gain": 0.5}, 1.1)):
        coefficient = KLCoefficient(1.0, 1.0, **options)
        coefficient.update(far)
        assert coefficient.value == pytest.approx(expected), options
    fixed = KLCoefficient(0.3)
    fixed.update(far)
    assert fixed.value == 0.3 and not fixed.adapts
    for options, message in (
        ({"kl_gain": 0.1}, "kl_gain needs kl_target"),
        ({"kl_gain": 0.0, "kl_target": 1.0}, "kl_gain must be above 0"),
        ({"kl_gain": 0.1, "kl_target": 1.0, "kl_horizon": 50}, "takes the place of kl_horizon"),
    ):
        with pytest.raises(ConfigError, match=message):
            on_policy_config(RLOOConfig, tmp_path, **options)


# ---- rollouts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture
def engine(model, tokenizer):
    made = TransformersEngine(model, tokenizer, max_model_len=22)
    yield made
    made.close()


def rows(tokenizer, count=4):
    found = prompts(count).to_list()
    return [{**row, "row": i, "prompt_ids": tokenizer(row["prompt"])["input_ids"]} for i, row in enumerate(found)]


def pipeline(engine, tokenizer, seed=0):
    sampling = SamplingParams(max_tokens=6, n=2)
    rewards = RewardColumns(wanted_words, None, tokenizer=tokenizer)
    requests = ReMax(2, "to_go", 1.0, None).requests(sampling)
    return RolloutPipeline(engine, tokenizer, rewards, requests, seed=seed, recorder=Recorder())


def ids(rollout):
    return [sample.completion_ids for sample in rollout.samples]


def test_the_pipeline_samples_and_scores(engine, tokenizer):
    made = pipeline(engine, tokenizer)
    rollout = made.run(rows(tokenizer), [0, 1, 2, 3], step=5, weight_version=0)
    assert len(rollout.samples) == 8 and [len(group) for group in rollout.extra] == [1] * 4
    for sample in [*rollout.samples, *(group[0] for group in rollout.extra)]:
        assert sample.score == sample.rewards["wanted_words"] == pytest.approx(wanted_words([sample.completion])[0])
        assert sample.weight_version == 0 and sample.ref_logps is None
    assert made.recorder.take().keys() == {"time/generate", "time/score"}


def test_draws_follow_from_seed_step_and_index(engine, tokenizer):
    """So a process that has the second half of the prompts, or one that runs ahead, draws the same."""
    prompts, made = rows(tokenizer), pipeline(engine, tokenizer)
    whole = made.run(prompts, [0, 1, 2, 3], step=1, weight_version=0)
    half = pipeline(engine, tokenizer).run(prompts[2:], [2, 3], step=1, weight_version=0)
    assert ids(half) == ids(whole)[4:]
    for other in (
        made.run(prompts, [0, 1, 2, 3], step=2, weight_version=0),
        made.run(prompts, [4, 5, 6, 7], step=1, weight_version=0),
        pipeline(engine, tokenizer, seed=1).run(prompts, [0, 1, 2, 3], step=1, weight_version=0),
    ):
        assert ids(other) != ids(whole)
    with pytest.raises(RolloutError, match="weights of version 0, and version 3 was asked for"):
        made.run(prompts, [0, 1, 2, 3], step=3, weight_version=3)


def test_the_engine_is_made_once_and_pushed_once_per_step(model, tokenizer):
    made, recorder = [], Recorder()

    def make(model):
        made.append(TransformersEngine(model, tokenizer, max_model_len=22))
        return made[-1]

    engine = SyncedEngine(make, recorder=recorder)
    assert engine.engine is None
    engine.sync(model, 3)
    assert len(made) == 1 and made[0].weight_version == 3 and not recorder.take().keys() - {"time/sync"}
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    engine.sync(model, 3)  # it has these, as far as it knows
    assert not recorder.take()
    engine.forget()
    engine.sync(model, 3)
    assert set(recorder.take()) == {"time/sync"}
    engine.sync(model, 4)
    assert made[0].weight_version == 4
    engine.close()
    assert made[0].closed and engine.engine is None
    engine.sync(model, 4)
    assert len(made) == 2
    given = SyncedEngine(make, made[1], recorder=recorder)
    given.close()
    assert not made[1].closed


def test_forward_passes_are_those_of_the_models(engine, model, tokenizer):
    other = tiny_model(tokenizer, seed=1)
    planner = BatchPlanner(tokenizer.pad_token_id, num_generations=2, shared_prefix=False)
    forward = ForwardPasses(planner, prepare=lambda batch: batch, temperature=0.7)
    samples = pipeline(engine, tokenizer).run(rows(tokenizer), [0, 1, 2, 3], 0, 0).samples
    parts = planner.plan_forward(samples, 3)
    assert [len(part) for part in parts] == [3, 2, 3] and {id(s) for p in parts for s in p} == set(map(id, samples))
    forward.fill(parts, "ref_logps", forward.reference_logps(reference_of(model, other)))
    forward.fill(parts, "old_logps", forward.policy_logps(model))
    measured = forward.kl_and_entropy(parts, model, reference_of(model, other))
    for sample in samples:
        whole = torch.tensor([sample.prompt["prompt_ids"] + sample.completion_ids])
        logps, ref_logps = (
            token_logps(m, whole, torch.ones_like(whole), temperature=0.7)[0, -sample.length :] for m in (model, other)
        )
        torch.testing.assert_close(sample.old_logps, logps.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sample.ref_logps, ref_logps.detach(), rtol=0, atol=1e-5)
        assert measured[id(sample)][0] == pytest.approx((logps - ref_logps).sum().item(), abs=1e-4)
        assert sample.ref_logps.untyped_storage().nbytes() == 4 * sample.length  # not a view of the batch


def test_the_evaluator_measures_a_policy(engine, model, tokenizer, tmp_path):
    args = on_policy_config(ReMaxConfig, tmp_path, eval_num_generations=2, per_device_eval_batch_size=3)
    planner = BatchPlanner(tokenizer.pad_token_id, num_generations=1, shared_prefix=False)
    forward = ForwardPasses(planner, lambda batch: batch, temperature=1.0)
    rewards = RewardColumns(wanted_words, [2.0], tokenizer=tokenizer)
    gold = RewardColumns(lambda completions: [float(len(c)) for c in completions], None)
    found = {}
    for name, given in (("gold", gold), ("none", None)):
        evaluator = PolicyEvaluator(args, engine, tokenizer, rewards, given, forward, ALONE)
        found[name] = evaluator.evaluate(rows(tokenizer), model, reference_of(model))
        assert evaluator.measured == [n for n in found[name][0] if n not in ("index", "sample")]
    assert [row["index"] for row in found["gold"]] == [0, 1, 2, 3]
    for row, other in zip(found["gold"], found["none"], strict=True):
        assert row["kl"] == 0 and row["gold"] > 1 and "gold" not in other
        assert row["proxy"] == pytest.approx(2 * row["rewards/wanted_words"]) == pytest.approx(other["proxy"])


def test_a_saved_rollout_is_as_large_as_its_samples(engine, tokenizer, tmp_path):
    """One long completion among short ones: what is saved does not grow with the longest times their number."""
    samples = pipeline(engine, tokenizer).run(rows(tokenizer), [0, 1, 2, 3], 0, 0).samples
    for sample, length in zip(samples, [20_000, *[1] * 7], strict=True):
        sample.completion_ids = [5] * length
    scatter(samples, "advantages", torch.zeros(8, 20_000, 1))
    scatter(samples, "ref_logps", torch.zeros(8, 20_000))
    path = tmp_path / "buffer.pt"
    content = RolloutBuffer.of(samples, 2, seed=0, number=4).state_dict(processes=2)
    assert content["mini_batches"][0][0]["completion_ids"] is samples[0].completion_ids  # copying takes half a minute
    torch.save(content, path)
    assert path.stat().st_size < 2 * 4 * 20_000 + 100_000  # 1,280,000 with views of whole matrices
    state = torch.load(path, weights_only=True)
    assert RolloutBuffer.from_state(state, 0, processes=2).mini_batch(0)[0].ref_logps.shape == (20_000,)
    with pytest.raises(TrainingError, match="2 processes share, and 1 resume it"):
        RolloutBuffer.from_state(state, 0, processes=1)


# ---- weightings and streams -----------------------------------------------------------------------------------------


def constrained(**options):
    held = [Constraint("a", "at_least", 0.5), Constraint("b", "at_most", 0.2)]
    return ConstrainedWeights(["a", "b", "c"], [1.0, 1.0, 3.0], ConstraintOptions(held, "sigmoid", None, **options))


def test_a_weighting_says_its_streams_and_scores():
    weighting, row = constrained(), {"a": 0.1, "b": 0.2, "c": 0.3}
    assert weighting.streams == [StreamSpec("task", 1.0, 1.0), StreamSpec("a_at_least"), StreamSpec("b_at_most")]
    assert weighting.scores(row) == {"task": pytest.approx(0.9), "a_at_least": 0.1, "b_at_most": 0.2}
    assert weighting.weights() == [1.0, 0.5, -0.5] and weighting.kl_weight == 1.0
    assert constrained(kl_in_constraints=True).kl_weight == 1.0  # 1 + 0.5 - 0.5
    assert FixedWeights(["a", "c"], [1.0, -2.0]).scores(row) == {"task": pytest.approx(-0.5)}
    assert not weighting.needs_gradients
    by_gradients = GradientWeights(["a", "c"], [1.0, 3.0], GradientSection(type="gradient", parameters="head"))
    assert by_gradients.needs_gradients == ("a", "c") and by_gradients.gradient_parameters == "head"


def test_streams_of_a_rollout_and_their_mixture(engine, tokenizer):
    def length(completions):
        return [len(text) / 10 for text in completions]

    made = pipeline(engine, tokenizer)
    made.rewards = RewardColumns([wanted_words, length], None, tokenizer=tokenizer)
    rollout = made.run(rows(tokenizer), [0, 1, 2, 3], 0, 0)
    for sample in rollout.samples:
        sample.ref_logps = torch.tensor(sample.engine_logps) - 0.1
    held = [Constraint("length", "at_least", 1.0)]
    weighting = ConstrainedWeights(["wanted_words", "length"], [1, 1], ConstraintOptions(held, "sigmoid", None))
    task, constraint = make_streams(rollout, weighting, beta=0.3)
    assert (task.name, task.beta, constraint.name, constraint.beta) == ("task", 0.3, "length_at_least", 0.0)
    assert task.scores.tolist() == pytest.approx([sample.rewards["wanted_words"] for sample in rollout.samples])
    assert constraint.extra_scores[:, 0].tolist() == pytest.approx([g[0].rewards["length"] for g in rollout.extra])
    estimator = ReMax(2, "to_go", 1.0, None)
    metrics = fill_advantages(rollout, estimator, weighting, ALONE, beta=0.3)
    assert len(metrics["remax/greedy_reward"]) == 8
    for i, sample in enumerate(rollout.samples):
        assert sample.advantages.shape == (sample.length, 2) and sample.returns is None
        greedy = rollout.extra[i // 2][0]
        kl_to_go = 0.1 * torch.arange(sample.length, 0, -1)
        wanted = torch.stack([
            sample.rewards["wanted_words"] - greedy.rewards["wanted_words"] - 0.3 * kl_to_go,
            (sample.rewards["length"] - greedy.rewards["length"]) * torch.ones(sample.length),
        ], dim=-1)  # fmt: skip
        torch.testing.assert_close(sample.advantages, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mix(sample.advantages, weighting), 0.5 * wanted.sum(-1), rtol=1e-4, atol=1e-5)


def test_the_kl_coefficient_follows_the_mean_over_the_sequences_that_count(engine, tokenizer):
    samples = pipeline(engine, tokenizer).run(rows(tokenizer), [0, 1, 2, 3], 0, 0).samples
    for i, sample in enumerate(samples):
        sample.ref_logps = torch.tensor(sample.engine_logps) - 0.1 * (i + 1)  # a KL of 0.1 (i + 1) a token
    samples[0].left_out = True
    mean = sum(0.1 * (i + 1) * sample.length for i, sample in enumerate(samples) if i) / 7
    coefficient = KLCoefficient(0.5, mean / 1.1, gain=0.1)  # a tenth above the target
    coefficient.follow(samples, ALONE)
    assert coefficient.value == pytest.approx(0.5 * (1 + 0.1 * 0.1), rel=1e-5)
    by_episodes = KLCoefficient(0.5, mean / 1.1, horizon=70)
    by_episodes.follow(samples, ALONE)
    assert by_episodes.value == pytest.approx(0.5 * (1 + 0.1 * 7 / 70), rel=1e-5)


def test_the_critics_loss_is_the_mean_over_its_heads():
    values = torch.tensor([[[1.0, 3.0], [2.0, 0.0], [9.0, 9.0]]], requires_grad=True)
    batch = {
        "completion_mask": torch.tensor([[1.0, 1.0, 0.0]]),
        "returns": torch.zeros(1, 3, 2),
        "values": values.detach(),
    }
    learner = SimpleNamespace(
        recorder=Recorder(),
        values=lambda batch: values,
        args=SimpleNamespace(value_clip=None, loss_aggregation="token_mean"),
        accelerator=SimpleNamespace(num_processes=1, scaler=None),
        record=lambda losses, *_: found.append(losses),
    )
    found: list[torch.Tensor] = []
    CriticLearner.learn(learner, batch, torch.tensor(2))
    assert found[0].tolist() == [[(1 + 9) / 2 / 2, 4 / 2 / 2, 0.0]]  # half of the squared error, of two heads
    assert values.grad.tolist() == [[[1 / 4, 3 / 4], [2 / 4, 0.0], [0.0, 0.0]]]
