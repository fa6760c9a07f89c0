"""One vLLM engine in two processes of a run, each with a slice of its weights (`rollout.tensor_parallel: 2`)."""

import pytest

from align.data import toy
from align.errors import ConfigError
from align.rollout import make_engine
from tests.rollout.rollout_models import llama, needs_vllm, never_ending
from tests.rollout.sharing_ranks import ASKED, SHARED, drawn, trained
from tests.trainers.tiny_runs import on_policy
from tests.trainers.two_processes import run_on_two


@needs_vllm
@pytest.mark.vllm
def test_two_processes_with_one_engine_draw_and_learn_what_one_process_does(tmp_path):
    """Each its own, also where one asks nothing, and what either does wrong is raised in both."""
    first, second = run_on_two("tests.rollout.sharing_ranks", tmp_path / "two", "shared")
    engine = make_engine(never_ending(llama()), toy.tokenizer(), backend="vllm", max_model_len=256)
    expected = drawn(engine, ASKED)
    one = trained(engine, tmp_path / "one", 1, {"backend": "vllm"})
    engine.close()
    for made, alone in zip(first["drawn"] + second["drawn"], expected, strict=True):
        for (ids, logps), (own_ids, own_logps) in zip(made, alone, strict=True):
            assert ids == own_ids
            assert logps == own_logps or logps == pytest.approx(own_logps, abs=1e-4)
    assert first["none"] == [] and [ids for ids, _ in second["none"][0]] == [ids for ids, _ in expected[0]]
    assert first["proved"] == second["proved"] == len(dict(llama().named_parameters()))
    assert max(first["trained"].pop("rollout/mean_abs_logp_diff")[:1]) < 1e-5
    for key, values in first["trained"].items():
        assert values == pytest.approx(one[key], rel=1e-3, abs=1e-4), key
    assert len(one["reward"]) == 3 and len(one["eval_proxy"]) == 2


def test_what_asks_unevenly_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="dynamic_sampling_rounds: processes ask.*set rollout.tensor_parallel: 1"):
        on_policy("rloo", tmp_path, rollout=SHARED, dynamic_sampling_rounds=1)


def test_one_process_shares_with_none(tmp_path):
    with pytest.raises(ConfigError, match="shares an engine between 2 processes of the run, which has 1"):
        make_engine(llama(), max_model_len=256, **SHARED)
