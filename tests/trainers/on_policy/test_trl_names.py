"""Options of TRL's GRPO and RLOO trainers: their names, what they are here, and the page that says so."""

from dataclasses import MISSING, fields

import numpy as np
import pytest
import torch
import trl
from transformers import LlamaForSequenceClassification

from align.data import toy
from align.errors import ConfigError
from align.trainers.core.ranks import Ranks
from align.trainers.core.trl_options import INSTEAD
from align.trainers.grpo import GRPOConfig
from align.trainers.on_policy.reward_funcs import rewards_given
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.streams import Stream
from align.trainers.on_policy.trl_names import TrlOnPolicyOptions
from align.trainers.rloo import RLOO, RLOOConfig, RLOOTrainer
from tests.test_coming_from_trl import PAGE, named
from tests.trainers.tiny_runs import on_policy_config, prompts, tiny_model, wanted_words

BOTH = ((GRPOConfig, trl.GRPOConfig), (RLOOConfig, trl.RLOOConfig))
ASKING = {
    "mask_truncated_completions": (True, "truncated: mask"),
    "shuffle_dataset": (False, "train_sampling_strategy: sequential"),
    "use_vllm": (True, "rollout: {backend: vllm}"),
    "vllm_importance_sampling_correction": (True, "rollout_correction"),
    "generation_kwargs": ({"top_k": 3}, "top_p, top_k, min_p and repetition_penalty"),
    "steps_per_generation": (4, "num_mini_batches"),
}


@pytest.mark.parametrize("name", ASKING)
def test_what_asks_for_something_says_what_to_write(name, tmp_path):
    value, message = ASKING[name]
    with pytest.raises(ConfigError, match=f"{name}: {value!r} has no effect here. Instead: .*{message}"):
        on_policy_config(RLOOConfig, tmp_path, **{name: value})


def test_the_names_are_those_of_trl():
    own = {f.name for f in fields(TrlOnPolicyOptions) if INSTEAD in f.metadata}
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


def test_rloo_clips_scores_and_normalises_advantages():
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    zero = torch.zeros(6, 2)
    stream = Stream("task", torch.tensor([-5.0, 1.0, 0.5, 9.0, 7.0, 7.0]), None, 0.0, zero, zero, mask)
    clipped = RLOO(2, reward_clip_range=(-1.0, 1.0)).estimate(stream, Ranks()).advantages
    expected = torch.tensor([-2.0, 2.0, -0.5, 0.5, 0.0, 0.0])
    torch.testing.assert_close(clipped, expected[:, None] * mask)
    both = RLOO(2, normalize_advantages=True, reward_clip_range=(-1.0, 1.0)).estimate(stream, Ranks()).advantages
    counted = expected[:4]  # the other two are left out
    torch.testing.assert_close(both[:4, 0], (counted - counted.mean()) / (counted.std() + 1e-4))
    assert torch.equal(both != 0, mask != 0)
    with pytest.raises(ConfigError, match="lowest and the highest score"):
        RLOO(2, reward_clip_range=(1.0, -1.0))


class Lengths:
    """A reward that is no function."""

    def __call__(self, completions, **kwargs):
        return [float(len(text)) for text in completions]


def test_reward_funcs_are_rewards(tmp_path):
    tokenizer = toy.tokenizer()
    config = tiny_model(tokenizer).config
    config.num_labels = 1
    classifier = LlamaForSequenceClassification(config)
    given = rewards_given(None, [Lengths(), wanted_words, classifier], [None, None, tokenizer], tokenizer)
    columns = RewardColumns(given, None, tokenizer=tokenizer)
    assert columns.names == ["Lengths", "wanted_words", "reward"]
    assert columns.rewards[2].model is classifier and columns.rewards[2].tokenizer is tokenizer
    with pytest.raises(ConfigError, match=r"processing classes \(1\) must match the number of reward functions \(2\)"):
        rewards_given(None, [Lengths(), wanted_words], [None], tokenizer)
    for twice in ((None, None), (wanted_words, wanted_words)):
        with pytest.raises(ConfigError, match="give the rewards once"):
            rewards_given(*twice, None, tokenizer)


def test_a_moving_reference_of_an_on_policy_run_is_resumed(tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 4, "num_generations_eval": 3}
    saving = {"save_strategy": "steps", "save_steps": 3}
    tokenizer = toy.tokenizer()

    def trained(resume=None):
        args = on_policy_config(RLOOConfig, tmp_path, per_device_train_batch_size=4, **options, **saving)
        trainer = RLOOTrainer(
            tiny_model(tokenizer), args=args, train_dataset=prompts(16), processing_class=tokenizer,
            reward_funcs=wanted_words,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        trainer.close()
        return trainer

    whole, again = trained(), trained(str(tmp_path / "checkpoint-3"))
    assert whole.args.eval_num_generations == 3
    start = tiny_model(tokenizer)
    for name, weight in whole.reference.model.named_parameters():
        assert torch.equal(weight, again.reference.model.get_parameter(name)), name
        assert not torch.equal(weight, start.get_parameter(name)), name


def test_completions_are_shown_and_scores_have_a_spread(tmp_path, capsys):
    """`log_completions`, and TRL's names `rewards/<name>/mean` and `/std`, of what the reward has given."""
    given = []

    def counting(completions):
        given.extend(float(len(text)) for text in completions)
        return given[-len(completions) :]

    shown = {"log_completions": True, "num_completions_to_print": 3}
    args = on_policy_config(RLOOConfig, tmp_path, num_generations=2, max_steps=2, logging_steps=1, **shown)
    trainer = RLOOTrainer(tiny_model(toy.tokenizer()), counting, args, prompts(8), processing_class=toy.tokenizer())
    trainer.train()
    trainer.close()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    count = len(given) // 2
    for log, scores in zip(logs, (given[:count], given[count:]), strict=True):
        assert log["rewards/counting/mean"] == log["rewards/counting"] == pytest.approx(np.mean(scores))
        assert log["rewards/counting/std"] == pytest.approx(np.std(scores)) and np.std(scores) > 0
    printed = capsys.readouterr().out
    assert printed.count(">>>> ") == 6 and f"rewards/counting {given[0]:.4g}" in printed
    with pytest.raises(ConfigError, match="only with log_completions: true"):
        on_policy_config(RLOOConfig, tmp_path, num_completions_to_print=3)
