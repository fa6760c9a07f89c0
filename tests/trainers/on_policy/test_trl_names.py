"""Options of TRL's GRPO and RLOO trainers: their names, what they are here, and the page that says so."""

from dataclasses import MISSING, fields

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from transformers import LlamaForSequenceClassification, TrainerCallback

from align.data import toy
from align.errors import ConfigError, DataError, RewardError
from align.objectives.policy_loss import aggregate_tokens
from align.reward_models.composite import CompositeReward
from align.reward_models.ensemble import RewardEnsemble
from align.reward_models.rules import RuleReward
from align.trainers.core.ranks import Ranks
from align.trainers.core.trl_options import instead_of
from align.trainers.grpo import GRPOConfig
from align.trainers.on_policy.buffer import block_sampler
from align.trainers.on_policy.estimators import make_estimator
from align.trainers.on_policy.objective import policy_objective
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.reward_funcs import rewards_given
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.samples import Sample, tokenized_prompts
from align.trainers.on_policy.streams import Stream, fill_advantages, mix
from align.trainers.on_policy.trl_names import TrlOnPolicyOptions
from align.trainers.rloo import RLOO, RLOOConfig, RLOOTrainer
from align.trainers.weighting.base import make_weighting
from tests.test_coming_from_trl import PAGE, named
from tests.trainers.tiny_runs import on_policy_config, prompts, tiny_model, wanted_words

BOTH = ((GRPOConfig, trl.GRPOConfig), (RLOOConfig, trl.RLOOConfig))
ASKING = {
    "vllm_mode": ("server", "rollout: {backend: server, urls"),
    "vllm_importance_sampling_correction": (True, "rollout_correction"),
    "vllm_server_port": (8001, "rollout: {backend: server, urls"),
    "vllm_structured_outputs_regex": ("a", "a reward of type format"),
}


@pytest.mark.parametrize("name", ASKING)
def test_what_asks_for_something_says_what_to_write(name, tmp_path):
    value, message = ASKING[name]
    with pytest.raises(ConfigError, match=f"{name}: {value!r} has no effect here. Instead: .*{message}"):
        on_policy_config(RLOOConfig, tmp_path, **{name: value})


def test_the_names_are_those_of_trl():
    own = {f.name for f in fields(TrlOnPolicyOptions) if instead_of(f)}
    assert own <= {f.name for _, theirs in BOTH for f in fields(theirs)}
    for ours, theirs in BOTH:  # every option can be named
        assert not {f.name for f in fields(theirs)} - {f.name for f in fields(ours)}
    section = PAGE.split("\n## GRPO and RLOO\n")[1]
    defaults, refused = section.split("Options that only take their default")
    assert named(refused) == own
    differ = set()
    for ours, theirs in BOTH:
        a, b = ({f.name: f.default for f in fields(config)} for config in (ours, theirs))
        shared = (a.keys() & b.keys()) - own - {"logging_nan_inf_filter"}  # listed for all methods
        differ |= {name for name in shared if MISSING not in (a[name], b[name]) and a[name] != b[name]}
    assert named(defaults) - {"GRPOConfig"} == differ | {"per_device_train_batch_size"}


@pytest.mark.parametrize("trls", [True, False])
def test_the_ratio_of_rloo_is_that_of_the_page(trls, tmp_path):
    """TRL's RLOO clips the probability ratio of whole sequences; here that of tokens is the default."""
    given = {"importance_sampling_level": "sequence_sum", "loss_aggregation": "sequence_mean"} if trls else {}
    args = on_policy_config(RLOOConfig, tmp_path, num_iterations=2, **given)
    generator = torch.Generator().manual_seed(0)
    logps, change = (torch.randn(2, 4, generator=generator) for _ in range(2))
    old, advantages, mask = logps + 0.3 * change, torch.tensor([[1.0], [-2.0]]).expand(2, 4), torch.ones(2, 4)
    batch = {"completion_mask": mask, "old_logps": old}
    losses, _ = policy_objective(logps, advantages, batch, args, kl_coefficient=0.0)
    ratio = (logps - old).sum(-1).exp()
    of_trl = -torch.minimum(ratio * advantages[:, 0], ratio.clamp(0.8, 1.2) * advantages[:, 0]).mean()
    assert torch.isclose(aggregate_tokens(losses, mask, args.loss_aggregation), of_trl) == trls


def test_the_engine(tmp_path):
    def engine(**options):
        return GRPOConfig(str(tmp_path), use_cpu=True, **options).rollout

    assert engine(use_vllm=False) == engine(rollout="transformers")
    assert engine(use_vllm=True) == engine(rollout="vllm") != engine() == engine(vllm_tensor_parallel_size=1)
    of_trl = {"vllm_gpu_memory_utilization": 0.5, "vllm_tensor_parallel_size": 2, "vllm_enable_sleep_mode": True}
    ours = {"backend": "vllm", "gpu_memory_utilization": 0.5, "tensor_parallel": 2, "sleep": True}
    assert engine(**of_trl) == engine(use_vllm=True, **of_trl) == engine(rollout=ours)
    servers = {"backend": "server", "urls": ["http://127.0.0.1:8000"]}
    for section in ("vllm", servers):  # which agree with it
        assert engine(use_vllm=True, rollout=section) == engine(rollout=section)
    for options, message in [
        ({"use_vllm": True, "rollout": "transformers"}, "use_vllm: write it in the section rollout instead"),
        ({"use_vllm": False, "vllm_gpu_memory_utilization": 0.5}, "is vLLM's, and use_vllm is false"),
        (
            {"use_vllm": False, "rollout": "vllm"},
            "use_vllm: write it in the section rollout instead, as rollout.backend",
        ),
        (
            {"use_vllm": True, "rollout_backend": "vllm"},
            "rollout_backend and use_vllm: write both in the section rollout",
        ),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 0}, "vllm_tensor_parallel_size"),
    ]:
        with pytest.raises(ConfigError, match=message):
            engine(**options)


def test_the_order_of_prompts(tmp_path):
    """Where a rollout is several steps: whole blocks, at random by data_seed or as the data stand."""

    def order(epoch=0, **options):
        batch = {"per_device_train_batch_size": 2, "num_mini_batches": 2, "num_iterations": 2, "num_generations": 2}
        args = on_policy_config(RLOOConfig, tmp_path, **batch, **options)
        return list(block_sampler(args, 9, lambda: 8 * epoch))

    as_they_come = [*range(4), *range(4), *range(4, 8), *range(4, 8)]
    assert order(shuffle_dataset=False) == order(1, train_sampling_strategy="sequential") == as_they_come
    assert order() == order(data_seed=42) != order(data_seed=1) and order(data_seed=1) != order(1, data_seed=1)
    assert order()[:4] == order()[4:8] and len(set(order())) == 8
    with pytest.raises(ConfigError, match="train_sampling_strategy: group_by_length sorts rows of one sequence"):
        order(train_sampling_strategy="group_by_length")


def test_the_rounds_of_tool_calls_as_trl_says_them(tmp_path):
    assert on_policy_config(RLOOConfig, tmp_path, max_tool_calling_iterations=2).max_turns == 3
    with pytest.raises(ConfigError, match="2 means max_turns = 3, and 2 is given"):
        on_policy_config(RLOOConfig, tmp_path, max_tool_calling_iterations=2, max_turns=2)
    with pytest.raises(ConfigError, match="a whole number from 0, got -1"):
        on_policy_config(RLOOConfig, tmp_path, max_tool_calling_iterations=-1)


def test_the_size_of_a_rollout_as_trl_says_it(tmp_path):
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_generations": 4}
    for given in ({"steps_per_generation": 6}, {"generation_batch_size": 48}, {"num_mini_batches": 2}):
        args = on_policy_config(RLOOConfig, tmp_path, shuffle_dataset=False, **batch, **given)
        assert args.num_mini_batches == 2 and args.prompts_per_rollout * args.num_generations == 48
        assert args.train_sampling_strategy == "sequential"
    for given, message in (
        (
            {"steps_per_generation": 4},
            "4 batches, and an optimiser step has gradient_accumulation_steps = 3. A rollout",
        ),
        ({"generation_batch_size": 36}, "an optimiser step has 24: .* = 2 prompts .TRL counts completions there."),
        ({"steps_per_generation": 6, "generation_batch_size": 48}, "say the same"),
        ({"steps_per_generation": 6, "num_mini_batches": 3}, "means num_mini_batches = 2, and 3 is given"),
        ({"generation_batch_size": 0}, "generation_batch_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            on_policy_config(RLOOConfig, tmp_path, **batch, **given)


def test_generation_kwargs_are_the_options_that_they_name(tmp_path):
    args = on_policy_config(RLOOConfig, tmp_path, generation_kwargs={"do_sample": True, "top_k": 3, "temperature": 0.7})
    assert (args.top_k, args.temperature) == (3, 0.7) and args.drawing["top_k"] == 3
    for given, message in (
        ({"num_beams": 2}, "num_beams would draw from a distribution whose probabilities the loss does not know"),
        ({"stop": ["###"]}, "stop: leave it out: a completion ends with an end token .* a string ended"),
        ({"stop_token_ids": [3]}, "generation config, whose eos_token_id may be a list"),
        ({"max_new_tokens": 64}, "max_new_tokens: max_completion_length is the option"),
        ({"n": 4}, "n: num_generations is the option"),
        ({"do_sample": False}, "the same completion"),
        ({"top_p": 0.5}, "top_p itself are given"),
        ({"top_p": 1.5}, "top_p"),
    ):
        with pytest.raises(ConfigError, match=message):
            options = {"top_p": 0.9} if "itself" in message else {}
            on_policy_config(RLOOConfig, tmp_path, generation_kwargs=given, **options)
    for rollout in ({"stop": ["###"]}, {"backend": "vllm", "stop_strings": "###"}):
        with pytest.raises(
            ConfigError, match="unknown key rollout.stop.*; leave it out: a completion ends with an end"
        ):
            on_policy_config(RLOOConfig, tmp_path, rollout=rollout)
    with pytest.raises(ConfigError, match="unknown argument stop_strings of .*; no option here.* end token to learn"):
        on_policy_config(RLOOConfig, tmp_path, stop_strings=["###"])
    masked = on_policy_config(GRPOConfig, tmp_path, mask_truncated_completions=True, delta=4.0)
    assert (masked.truncated, masked.dual_clip) == ("mask", 4.0)


def test_chat_template_kwargs_reach_the_template(tmp_path):
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} {{ closing }}"
    words = [row["prompt"] for row in toy.split_prompts(0, 4)[0]]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in words])
    own = rows.add_column("chat_template_kwargs", [{"closing": "wave"}] * 4)
    args = on_policy_config(GRPOConfig, tmp_path, chat_template_kwargs={"closing": "rose"})
    for data, word in ((rows, "rose"), (own, "wave")):
        last = {row["prompt_ids"][-1] for row in tokenized_prompts(data, tokenizer, args)}
        assert last == {tokenizer.convert_tokens_to_ids(word)}
    with pytest.raises(DataError, match="chat_template_kwargs are for prompts of messages"):
        tokenized_prompts(prompts(4), tokenizer, args)


def test_rewards_that_are_compared_apart_weigh_the_same(tmp_path):
    """GDPO: the scale of a reward is nothing, its weight is; the mixture has deviation 1. As in TRL's code."""
    args = on_policy_config(GRPOConfig, tmp_path, num_generations=3, multi_objective_aggregation="normalize_then_sum")
    scores = torch.tensor([[1.0, 2.0, 4.0, 3.0, 3.0, 9.0], [0.1, 0.0, 0.0, 0.2, 0.5, 0.1]])
    weights = {"large": 0.7, "small": 0.3}
    samples = [
        Sample({}, [0] * 2, "", [0.0] * 2, False, 0, rewards={"large": a, "small": b}) for a, b in scores.T.tolist()
    ]
    weighting = make_weighting(weights, args)
    rollout = ScoredRollout(samples, [[], []], 0)
    fill_advantages(rollout, make_estimator(args), weighting, Ranks(), 0.0)
    found = torch.stack([mix(s.advantages, weighting)[0] for s in samples])
    grouped = scores.view(2, 2, 3)
    alone = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 1e-4)
    total = (torch.tensor([0.7, 0.3])[:, None, None] * alone).sum(0).flatten()
    torch.testing.assert_close(found, (total - total.mean()) / (total.std() + 1e-4))
    assert weighting.kl_weight == 1.0
    for options, message in (
        ({"kl_in": "reward"}, "set kl_in: loss"),
        ({"missing_eos_penalty": 1.0}, "put them into a reward"),
        ({"scale_rewards": False}, "scale_rewards other than group"),
        ({"multi_objective_aggregation": "sum"}, "must be one of"),
    ):
        given = {"multi_objective_aggregation": "normalize_then_sum", **options}
        with pytest.raises(ConfigError, match=message):
            on_policy_config(GRPOConfig, tmp_path, **given)


def test_a_stream_of_prompts_trains_as_its_rows(tmp_path):
    """Several steps per rollout, other columns for the reward, and a checkpoint inside a rollout."""
    rows = prompts(32).add_column("wish", list(range(32)))
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(sorted({sample.prompt["wish"] for sample in self.trainer.buffer.samples}))

    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}

    def run(data, resume=None, evaluated=None):
        options = {"per_device_train_batch_size": 4, "num_mini_batches": 2, "num_generations": 2}
        tokenizer, more = toy.tokenizer(), {"train_sampling_strategy": "sequential"}
        args = on_policy_config(RLOOConfig, tmp_path, **options, **saving, **more)
        trainer = RLOOTrainer(tiny_model(tokenizer), wanted_words, args, data, evaluated, processing_class=tokenizer)
        watch = Watch()
        watch.trainer = trainer
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=resume)
        trainer.close()
        return trainer

    streamed = run(rows.to_iterable_dataset(), evaluated=prompts(8).add_column("wish", [0] * 8).to_iterable_dataset())
    assert seen == [list(range(i, i + 8)) for i in (0, 0, 8, 8, 16, 16)]
    assert len(streamed.eval_dataset) == 8 and streamed.args.accelerator_config.dispatch_batches is False
    found = streamed.evaluate({"x": prompts(4).add_column("wish", [0] * 4).to_iterable_dataset()})
    assert found["eval_x_loss"] == pytest.approx(0.05 * found["eval_x_kl"] - found["eval_x_proxy"])
    again = run(rows.to_iterable_dataset(), str(tmp_path / "checkpoint-3"), prompts(8).add_column("wish", [0] * 8))
    for name, weight in streamed.model.named_parameters():
        assert torch.equal(weight, again.model.get_parameter(name)), name
    args = on_policy_config(RLOOConfig, tmp_path, max_steps=2, accelerator_config={"dispatch_batches": True})
    with pytest.raises(ConfigError, match="Iterable datasets require `dispatch_batches=False`"):
        RLOOTrainer(tiny_model(toy.tokenizer()), wanted_words, args, rows.to_iterable_dataset())
    args = on_policy_config(RLOOConfig, tmp_path, num_iterations=2, max_steps=2)
    with pytest.raises(ConfigError, match="num_iterations: the prompts are a stream, which is read once"):
        RLOOTrainer(tiny_model(toy.tokenizer()), wanted_words, args, rows.to_iterable_dataset())


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
    config.num_labels, config.pad_token_id = 1, None  # as models are on the hub that were not made for scoring
    classifier = LlamaForSequenceClassification(config)
    given = rewards_given(None, [Lengths(), wanted_words, classifier], [None, None, tokenizer], tokenizer)
    columns = RewardColumns(given, None, tokenizer=tokenizer)
    assert columns.names == ["Lengths", "wanted_words", "reward"]
    assert columns.rewards[2].model is classifier and columns.rewards[2].tokenizer is tokenizer
    both, one = (columns.rewards[2].score_ids(ids) for ids in ([[5, 6, 7], [8]], [[8]]))
    assert both[1].item() == pytest.approx(one.item(), abs=1e-6)
    with pytest.raises(ConfigError, match=r"processing classes \(1\) must match the number of reward functions \(2\)"):
        rewards_given(None, [Lengths(), wanted_words], [None], tokenizer)
    with pytest.raises(ConfigError, match=r"processing classes \(1\) must match the number of reward functions \(2\)"):
        rewards_given(None, [classifier, wanted_words], tokenizer, tokenizer)
    for twice in ((wanted_words, wanted_words),):
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
        assert torch.equal(weight, again.ref_model.get_parameter(name)), name
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


def test_the_mean_of_an_ensemble_is_of_its_scores(policy, tmp_path):
    """What the members' mean was logged as too, so that mean and deviation were of both together."""
    members = [RuleReward(lambda completions, k=k: [k * len(c) for c in completions], name=f"m{k}") for k in (1.0, 3.0)]
    reward = RewardEnsemble(members, "wco", name="rm")
    args = on_policy_config(RLOOConfig, tmp_path, num_generations=2, max_steps=1, logging_steps=1)
    trainer = RLOOTrainer(policy, reward, args, prompts(8))
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert log["rewards/rm/mean"] == log["rewards/rm"] == log["rewards/rm/member/0"] > 0
    assert log["rewards/rm/members_mean"] == pytest.approx(2 * log["rewards/rm"])
    assert log["rewards/rm/std"] ** 2 == pytest.approx(log["rewards/rm/variance"] - log["rewards/rm"] ** 2, rel=1e-4)
    named = CompositeReward([RuleReward(lambda completions: [0.0] * len(completions), name="mean")], name="sum")
    with pytest.raises(RewardError, match="a part of a composite. called 'mean', and rewards/sum/mean is logged"):
        RLOOTrainer(policy, named, args, prompts(8)).train()


def test_what_a_reward_logs_is_in_evaluations_too(policy, tmp_path, caplog):
    """Of each set by its name, and to choose the best model by, which is no name that is known beforehand."""

    def counted(completions, log_metric):
        log_metric("asked", len(completions))
        log_metric("length", -1.0)  # which evaluations measure themselves
        return wanted_words(completions)

    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "few_asked", "greater_is_better": True}
    args = on_policy_config(RLOOConfig, tmp_path, **often, **best, num_generations_eval=2)
    sets = {"few": prompts(3, seed=1), "more": prompts(4, seed=1)}
    trainer = RLOOTrainer(policy, [counted, wanted_words], args, prompts(8), sets)
    trainer.train()
    logs = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    assert (logs["eval_few_asked"], logs["eval_more_asked"], logs["asked"]) == (6, 8, 16)
    assert logs["eval_few_length"] > 0 and trainer.state.best_metric == 6
    assert caplog.text.count("log_metric('length', ...): an evaluation logs a number of its own") == 1
