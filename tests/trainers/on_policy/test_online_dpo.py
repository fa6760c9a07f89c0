"""Online DPO: its pairs, that its loss is DPO's on them, exact resumes, learning, and what is refused."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from align.data import toy
from align.errors import ConfigError
from align.trainers.core.ranks import Ranks
from align.trainers.dpo import DPOTrainer
from align.trainers.on_policy.pair_batches import PairPlanner, in_groups
from align.trainers.on_policy.pair_selection import BestWorst, make_pairs
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.samples import Sample, completion_masks
from align.trainers.on_policy.streams import Stream
from align.trainers.sft import SFTTrainer
from tests.trainers.pairs.preference_runs import dpo_config
from tests.trainers.tiny_runs import (
    assert_same,
    demonstrations,
    logged,
    on_policy,
    parameters,
    prompts,
    sft_config,
    tiny_model,
    wanted_words,
)

SEVERAL = {"num_mini_batches": 2, "num_iterations": 2}


def make(policy, folder, rows=64, reward=wanted_words, eval_rows=None, **options):
    trainer_options = {
        name: options.pop(name) for name in ("peft_config", "ref_model", "gold_reward") if name in options
    }
    trainer_class, args = on_policy("online_dpo", folder, **{"num_generations": 3, **options})
    return trainer_class(policy, reward, args, prompts(rows), eval_rows, **trainer_options)


def other_policy(tokenizer):
    return tiny_model(tokenizer, seed=5)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def samples_of(prompt: list[int], scores: list[float | None]) -> list[Sample]:
    """Completions of one, two, three ... tokens; None is left out."""
    made = [Sample({"prompt_ids": prompt}, [4] * (i + 1), "", [-1.0] * (i + 1), False, 0) for i in range(len(scores))]
    for sample, score in zip(made, scores, strict=True):
        sample.score, sample.left_out = score or 0.0, score is None
    return made


@pytest.mark.parametrize(
    ("scores", "pair"),
    [
        ([0.5, 2.0, -1.0, 0.0], (1, 2)),
        ([1.0, 3.0, 3.0, 1.0], (1, 0)),  # of equal ones the first
        ([None, 0.0, 5.0, None], (2, 1)),
        ([None, 0.0, None, None], None),  # one alone
        ([2.0, 2.0, 2.0, None], None),  # a tie
        ([None] * 4, None),
    ],
)
def test_the_pair_is_the_best_and_the_worst_that_count(scores, pair):
    samples = samples_of([5, 6], [0.0, 1.0, 2.0, 3.0]) + samples_of([7], scores)
    mask = completion_masks(samples)
    stream = Stream("task", torch.tensor([s.score for s in samples]), None, 0.0, mask, mask, mask)
    found = BestWorst(4).estimate(stream, Ranks())
    assert found.metrics["pairs/without_signal"] == [0.0, float(pair is None)]
    assert len(found.metrics["pairs/score_gap"]) == 2 - (pair is None)
    for sample, row in zip(samples, found.advantages, strict=True):
        sample.advantages = row[: sample.length, None]
    pairs = make_pairs(ScoredRollout(samples, [[], []], 0))
    assert [sample.length for sample in pairs[:2]] == [4, 1] and len(pairs) == 4
    assert [sample.left_out for sample in pairs] == [False, False, pair is None, pair is None]
    if pair is not None:
        assert tuple(sample.length - 1 for sample in pairs[2:]) == pair


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("budget", [None, 60])
def test_no_micro_batch_parts_a_pair(shared, budget):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (40,), generator=generator).tolist()
    samples = [
        Sample({"prompt_ids": [i // 2] * 8}, [i] * length, "", [0.0] * length, False, 0)
        for i, length in enumerate(lengths)
    ]
    planner = PairPlanner(0, num_generations=8, shared_prefix=shared, tokens=budget)
    parts = planner.plan(samples, 5)
    for part in parts:
        chosen, rejected = part[: len(part) // 2], part[len(part) // 2 :]
        assert [(a.completion_ids[0] % 2, a.prompt) for a in chosen] == [(0, b.prompt) for b in rejected]
        assert budget is None or planner.collate(part)["input_ids"].numel() <= budget
    assert sorted(s.completion_ids[0] for part in parts for s in part) == list(range(40))
    assert (len(parts) == 5) == (budget is None)
    assert sum(map(len, planner.plan_forward(samples, 16))) == 40  # no pairs needed, but all samples


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batching", "loss"),
    [
        ("shared_prefix", {"loss_type": "sigmoid"}),
        ("padded", {"loss_type": "ipo"}),
        ("shared_prefix", {"loss_type": ["nca_pair", "hinge"], "loss_weights": [1.0, 0.5]}),
        ("padded", {"loss_type": "cdpo", "ld_alpha": 0.5}),
    ],
)
def test_it_is_dpo_on_the_pairs_that_it_made(batching, loss, policy, tokenizer, tmp_path):
    """Same loss, gradient norm, implicit rewards and weights after the step as `DPOTrainer` on the same tokens."""
    common = {**loss, "batching": batching, "max_steps": 1, "beta": 0.2}
    online = make(policy, tmp_path / "online", ref_model=other_policy(tokenizer), **common)
    online.train()
    pairs = in_groups([sample for sample in online.buffer.samples if not sample.left_out], 2)
    rows = [
        {"prompt_ids": w.prompt["prompt_ids"], "chosen_ids": w.completion_ids, "rejected_ids": r.completion_ids}
        for w, r in pairs
    ]
    assert 4 <= len(rows) <= 8
    args = dpo_config(tmp_path / "dpo", per_device_train_batch_size=len(rows), **common)
    offline = DPOTrainer(policy, args, Dataset.from_list(rows), ref_model=other_policy(tokenizer))
    offline.train()
    for key in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen"):
        assert logged(online, key) == pytest.approx(logged(offline, key), rel=2e-5), key
    for name, weight in parameters(offline.model).items():  # Adam makes whole steps of rounding errors
        gap = (parameters(online.model)[name] - weight).abs()
        assert gap.mean() < 1e-6 and (gap > 1e-5).float().mean() < 1e-3, name


def test_the_batch_may_be_cut_in_any_way(policy, tokenizer, tmp_path):
    """Ties and completions that are left out included: the loss is the mean over the pairs of the step."""

    def coarse(completions, **columns):
        return [float("rose" in text or len(text) % 2) for text in completions]

    found = []
    cuts = [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "batching": "padded"},
        {"tokens_per_batch": 44, "forward_tokens_per_batch": 60},
    ]
    for number, cut in enumerate(cuts):
        options = {"max_steps": 4, "truncated": "mask", **SEVERAL, **cut}
        trainer = make(policy, tmp_path / str(number), reward=coarse, ref_model=other_policy(tokenizer), **options)
        trainer.train()
        assert 0 < sum(logged(trainer, "pairs/without_signal")) < 4
        found.append({key: torch.tensor(logged(trainer, key)) for key in ("loss", "grad_norm", "reward")})
    for other in found[1:]:
        for key, values in other.items():
            torch.testing.assert_close(values, found[0][key], rtol=2e-3, atol=1e-4, msg=key)


def test_a_step_without_a_pair_changes_nothing(policy, tmp_path, caplog):
    trainer = make(policy, tmp_path, reward=lambda completions, **columns: [1.0] * len(completions), max_steps=1)
    before = parameters(trainer.model)
    trainer.train()
    assert_same(before, parameters(trainer.model))
    assert logged(trainer, "pairs/without_signal") == [1.0] and "no prompt has a pair" in caplog.text


def test_inpo_takes_the_policy_that_wrote_the_pairs_into_the_reference(policy, tokenizer, tmp_path):
    """At a rollout's first step policy and pi_t are one: of the log-ratio to the reference tau/eta is left; after it
    they differ, and the loss is that of IPO on sums against the mixture."""
    share = 0.75
    options = {
        "loss_type": "ipo_sum",
        "beta": 0.5,
        "num_iterations": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
    }
    found = {}
    for old in (0.0, share):
        trainer = make(policy, tmp_path / str(old), ref_model=other_policy(tokenizer), old_policy_share=old, **options)
        trainer.train()
        found[old] = trainer
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        plain, mixed = (logged(found[old], key)[0] for old in (0.0, share))
        assert mixed == pytest.approx((1 - share) * plain, rel=1e-4, abs=1e-6), key
    assert logged(found[share], "rewards/margins")[1] > logged(found[share], "rewards/margins")[0]
    assert all(sample.old_logps is not None for sample in found[share].buffer.samples)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_resuming_inside_a_rollout_is_exact(adapter, policy, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if adapter else None
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3, "max_steps": 7}

    def run(resume):
        evaluated = {"eval_rows": prompts(6, seed=1), "eval_strategy": "steps", "eval_steps": 3}
        trainer = make(policy, tmp_path, rows=24, peft_config=lora, **SEVERAL, **options, **evaluated)
        trainer.train(resume_from_checkpoint=resume)
        lines = (tmp_path / "overoptimization.jsonl").read_text().splitlines()[1:]
        return parameters(trainer.model), logged(trainer, "loss"), [line.split('"time"')[0] for line in lines]

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-3"))
    assert_same(whole[0], resumed[0])
    assert whole[1:] == resumed[1:]


def test_gold_rises_on_the_toy_world(tokenizer, tmp_path):
    """From a policy that has seen answers. The proxy sees their helpfulness alone; the gold score beside it, which is
    never trained on, follows it."""
    settings = {"max_steps": 40, "learning_rate": 5e-3, "per_device_train_batch_size": 32}
    start = SFTTrainer(
        tiny_model(tokenizer),
        sft_config(tmp_path / "start", **settings),
        demonstrations(256),
        processing_class=tokenizer,
    )
    start.train()
    start.save_model()
    options = {"max_steps": 24, "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 12}
    evaluated = {"eval_rows": prompts(48, seed=1), "gold_reward": toy.gold, "eval_strategy": "steps", "eval_steps": 12}
    trainer = make(
        str(tmp_path / "start"),
        tmp_path,
        rows=128,
        reward=toy.gold_helpfulness,
        learning_rate=2e-3,
        beta=0.05,
        **options,
        **evaluated,
    )
    trainer.train()
    records = [
        json.loads(line)["per_prompt"] for line in (tmp_path / "overoptimization.jsonl").read_text().splitlines()[1:]
    ]
    proxy, gold, kl = ([sum(r[key]) / 48 for r in records] for key in ("proxy", "gold", "kl"))
    assert proxy[0] < proxy[1] < proxy[2] and gold[2] > gold[0] + 1, (proxy, gold)
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[2] > kl[1] > 0.1, kl
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-4)  # log 2: policy and reference are the same


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "a pair is made of the prompt's own completions"),
        ({"loss_type": "tdpo2"}, "KL over the whole vocabulary"),
        ({"loss_type": "simpo"}, "has no reference"),
        ({"loss_type": "beta_dpo"}, "compares a pair with the others"),
        ({"loss_type": "grpo"}, "loss_type 'grpo' is unknown"),
        ({"beta": 0.0}, "beta must be > 0"),
        ({"old_policy_share": 1.0}, "old_policy_share must be at least 0 and below 1"),
        ({"use_weighting": True}, "these it has written"),
        ({"simpo_gamma": 1.0}, "simpo_gamma would be ignored"),
        ({"kl_in": "loss"}, "kl_in: 'loss' has no effect here"),
        ({"epsilon": 0.1}, "epsilon: 0.1 has no effect here"),
        ({"constraints": [{"reward": "a", "direction": "equal", "threshold": 0}]}, "reward_weights, whose weighted"),
        ({"dynamic_weights": {"type": "hypervolume"}}, "reward_weights, whose weighted"),
        ({"truncated": "bootstrap"}, "only PPO has"),
        ({"tokens_per_batch": 30}, "set tokens_per_batch to at least 44"),
    ],
)
def test_options_are_checked(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        on_policy("online_dpo", tmp_path, **{"num_generations": 2, **options})


def test_a_reward_may_not_have_a_name_of_the_loss(policy, tmp_path):
    def chosen(completions, **columns):
        return wanted_words(completions)

    with pytest.raises(ConfigError, match="a reward is called chosen"):
        make(policy, tmp_path, reward=chosen)
