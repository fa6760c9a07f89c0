"""Groups without signal are replaced by other prompts, the same ones however a run is cut."""

import pytest

from align.errors import ConfigError
from align.trainers.core.ranks import Ranks
from align.trainers.core.recorder import Recorder
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.refill import DynamicSampling
from align.trainers.on_policy.samples import Sample
from align.trainers.reinforce_pp import ReinforcePPConfig
from align.trainers.weighting.base import FixedWeights
from tests.trainers.tiny_runs import assert_same, logged, on_policy, on_policy_config, parameters, prompts

PLAIN = FixedWeights(["good"], [1.0])
ROWS = [{"row": i} for i in range(50)]


def group(row, scores):
    return [Sample(row, [1], "x", [-1.0], False, 0, rewards={"good": score}) for score in scores]


def filled(groups, indices, rounds, *, extra=None, signal_from=2):
    """Groups of two after filling: what is drawn has signal from the given round on."""
    asked = []

    def draw(rows, numbers):
        asked.append([(row["row"], number) for row, number in zip(rows, numbers, strict=True)])
        good = len(asked) >= signal_from
        return ScoredRollout(sum((group(row, [0.0, float(good)]) for row in rows), []), [[] for _ in rows], 0)

    recorder = Recorder()
    rollout = ScoredRollout(sum(groups, []), extra or [[] for _ in groups], 0)
    DynamicSampling(rounds, 10, ROWS, 0, Ranks(), recorder).fill(rollout, indices, 7, PLAIN, draw, lambda: None)
    return rollout, asked, recorder.take()


def test_only_groups_without_signal_are_replaced():
    groups = [group({"row": "a"}, [1.0, 2.0]), group({"row": "b"}, [1.0, 1.0]), group({"row": "c"}, [0.0, 0.0])]
    rollout, asked, metrics = filled(groups, [0, 1, 2], rounds=3)
    assert [number for round_ in asked for _, number in round_] == [11, 12, 21, 22]  # draws of their own
    assert rollout.samples[:2] == groups[0] and len(rollout.samples) == 6
    assert [s.rewards["good"] for s in rollout.samples[2:]] == [0.0, 1.0] * 2
    assert [s.prompt["row"] for s in rollout.samples[2::2]] == [row for row, _ in asked[1]]
    assert metrics == {
        "dynamic_sampling/without_signal": pytest.approx(2 / 3),
        "dynamic_sampling/rounds": 2,
        "dynamic_sampling/left": 0,
    }
    # the same prompts on a process that has only the third of them
    assert filled(groups[2:], [2], rounds=3)[1] == [[asked[0][1]], [asked[1][1]]]


def test_the_limit_holds_and_greedy_answers_count():
    level = group({"row": "a"}, [1.0, 1.0])
    rollout, asked, metrics = filled([level], [0], rounds=2, signal_from=9)
    assert len(asked) == 2 and metrics["dynamic_sampling/left"] == 1 and len(rollout.samples) == 2
    assert not filled([level], [0], rounds=2, extra=[group({}, [0.0])])[1]  # ReMax's baseline differs: signal
    level[1].rewards["good"], level[1].left_out = 5.0, True
    assert filled([level], [0], rounds=1)[1]  # what is left out is no signal


def test_it_needs_something_to_compare(tmp_path):
    with pytest.raises(ConfigError, match="set num_generations to 2"):
        on_policy_config(ReinforcePPConfig, tmp_path, dynamic_sampling_rounds=1)
    with pytest.raises(ConfigError, match="dynamic_sampling_rounds must be at least 0"):
        on_policy_config(ReinforcePPConfig, tmp_path, dynamic_sampling_rounds=-1)


def even(completions):
    return [float(len(text.split()) % 2) for text in completions]


def test_a_resumed_run_draws_the_same(policy, tmp_path):
    def make(**options):
        trainer_class, args = on_policy(
            "rloo", tmp_path / "run", dynamic_sampling_rounds=3, save_strategy="steps", save_steps=2, **options
        )
        return trainer_class(policy, even, args, prompts(16))

    whole = make(max_steps=3)
    whole.train()
    before, left = (logged(whole, f"dynamic_sampling/{name}") for name in ("without_signal", "left"))
    assert min(before) > 0 and sum(left) < sum(before) and max(logged(whole, "dynamic_sampling/rounds")) <= 3
    resumed = make(max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(parameters(whole.model), parameters(resumed.model))
