"""Options of TRL's GRPO and RLOO trainers: their names, what they are here, and the page that says so."""

from dataclasses import MISSING, fields

import pytest
import trl

from align.errors import ConfigError
from align.trainers.grpo import GRPOConfig
from align.trainers.on_policy.trl_names import TrlOnPolicyOptions
from align.trainers.rloo import RLOOConfig
from tests.test_coming_from_trl import PAGE, named
from tests.trainers.tiny_runs import on_policy_config

BOTH = ((GRPOConfig, trl.GRPOConfig), (RLOOConfig, trl.RLOOConfig))
ASKING = {
    "mask_truncated_completions": (True, "truncated: mask"),
    "num_generations_eval": (2, "eval_num_generations"),
    "use_vllm": (True, "rollout: {backend: vllm}"),
    "vllm_importance_sampling_correction": (True, "rollout_correction"),
    "repetition_penalty": (1.1, "top_p, top_k or min_p"),
    "sync_ref_model": (True, "ref_model"),
    "steps_per_generation": (4, "num_mini_batches"),
}


@pytest.mark.parametrize("name", ASKING)
def test_what_asks_for_something_says_what_to_write(name, tmp_path):
    value, message = ASKING[name]
    with pytest.raises(ConfigError, match=f"{name}: {value!r} has no effect here. Instead: .*{message}"):
        on_policy_config(RLOOConfig, tmp_path, **{name: value})


def test_the_names_are_those_of_trl():
    own = {f.name for f in fields(TrlOnPolicyOptions)}
    assert own <= {f.name for _, theirs in BOTH for f in fields(theirs)}
    section = PAGE.split("\n## GRPO and RLOO\n")[1]
    defaults, refused = section.split("Options that only take their default")
    assert named(refused) == own
    differ = set()
    for ours, theirs in BOTH:
        a, b = ({f.name: f.default for f in fields(config)} for config in (ours, theirs))
        shared = (a.keys() & b.keys()) - own - {"logging_nan_inf_filter"}  # listed for all methods
        differ |= {name for name in shared if MISSING not in (a[name], b[name]) and a[name] != b[name]}
    assert named(defaults) - {"GRPOConfig"} == differ | {"per_device_train_batch_size"}


@pytest.mark.parametrize(("given", "scale"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_takes_trls_values(given, scale, tmp_path):
    assert on_policy_config(GRPOConfig, tmp_path, scale_rewards=given).scale_rewards == scale
