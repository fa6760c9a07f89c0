"""One vLLM engine in two processes of a run, each with a slice of its weights (`rollout.tensor_parallel: 2`)."""

import os

import pytest
import torch

from align.data import toy
from align.errors import ConfigError
from align.reward_models.judges import JudgeReward
from align.reward_models.self_judge import SelfJudge
from align.rollout import make_engine
from align.rollout.vllm_ranks import SHARED_MEMORY
from align.trainers.on_policy.self_judges import bind_judges
from tests.rollout.rollout_models import llama, needs_vllm, never_ending
from tests.rollout.sharing_ranks import ASKED, SHARED, drawn, refilled, talked, trained
from tests.trainers.tiny_runs import on_policy
from tests.warm import run_ranks

FOUR = pytest.mark.skipif(
    "ALIGN_FOUR_PROCESSES" not in os.environ, reason="set ALIGN_FOUR_PROCESSES=1, as .ci/run does: 8 GiB, two minutes"
)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=FOUR)])
def test_processes_that_share_engines_draw_and_learn_what_one_process_does(count, tmp_path):
    """Each its own, also where one asks nothing, and what one does wrong is raised in all. Four have two engines."""
    memory = {file.name for file in SHARED_MEMORY.iterdir()}
    run_ranks("tests.rollout.sharing_ranks", str(tmp_path / "ranks"), logs=tmp_path / "ranks", count=count)
    found = [torch.load(tmp_path / "ranks" / f"rank{rank}.pt") for rank in range(count)]
    left = {file.name for file in SHARED_MEMORY.iterdir()} - memory
    assert not [name for name in left if "cpushm" in name]  # which would keep the next run from starting
    engine = make_engine(never_ending(llama()), toy.tokenizer(), backend="vllm", max_model_len=256)
    expected = drawn(engine, ASKED)
    one = trained(engine, tmp_path / "one", 1, {"backend": "vllm"})
    refills = refilled(engine, tmp_path / "refilled", 1, {"backend": "vllm"})
    talks = talked(engine, tmp_path / "talks", 1, {"backend": "vllm"})
    engine.close()
    for made, alone in zip([one for own in found for one in own["drawn"]], expected, strict=True):
        for (ids, logps), (own_ids, own_logps) in zip(made, alone, strict=True):
            assert ids == own_ids
            assert logps == own_logps or logps == pytest.approx(own_logps, abs=1e-4)
    for rank, own in enumerate(found):
        asked = expected[: 2 * (rank % 2)]
        assert [[ids for ids, _ in made] for made in own["none"]] == [[ids for ids, _ in alone] for alone in asked]
        assert own["proved"] == len(dict(llama().named_parameters()))
    first = found[0]
    assert max(first["trained"].pop("rollout/mean_abs_logp_diff")[:1]) < 1e-5
    for key, values in first["trained"].items():
        assert values == pytest.approx(one[key], rel=1e-3, abs=1e-4), key
    assert max(refills["dynamic_sampling/rounds"]) > 1 and max(refills["dynamic_sampling/without_signal"]) > 0.3
    for key, values in first["refilled"].items():
        assert values == pytest.approx(refills[key], rel=1e-3, abs=1e-4), key
    turns, calls, finished, *_, gaps = talks
    assert min(turns) > 2 and min(calls) > 0.3 and max(finished) > 0 and max(gaps) < 1e-5
    for own in found:
        for values, alone in zip(own["talked"][:-1], talks, strict=False):
            assert values == pytest.approx(alone, rel=1e-3, abs=1e-4)
    assert len(one["reward"]) == 3 and len(one["eval_proxy"]) == 2


def test_a_policy_that_judges_itself_is_refused(tmp_path):
    _, args = on_policy("rloo", tmp_path, rollout=SHARED)
    rewards = [JudgeReward(SelfJudge("self", max_tokens=16), name="self")]
    with pytest.raises(ConfigError, match="reward 'self': each process asks.*set rollout.tensor_parallel: 1"):
        bind_judges(rewards, None, toy.tokenizer(), args)


@needs_vllm
def test_one_process_shares_with_none(tmp_path):
    with pytest.raises(ConfigError, match="shares an engine between 2 processes of the run, which has 1"):
        make_engine(llama(), max_model_len=256, **SHARED)
