"""D2PO: which pairs get gold labels, what they do, exact resumes, and that a few keep the discriminator right."""

import json

import numpy as np
import pytest
import torch

from align.data import toy
from align.errors import ConfigError, TrainingError
from align.reward_models.build import build_reward
from align.reward_models.classifier import ClassifierReward
from align.trainers.on_policy.discriminator import GoldPair
from tests.trainers import tiny_runs
from tests.trainers.on_policy import d2po_ranks
from tests.trainers.on_policy.test_online_docs import D2PO, metrics_of
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters, prompts, wanted_words
from tests.warm import run_ranks


@pytest.fixture(scope="module")
def discriminator(tokenizer, tmp_path_factory) -> str:
    """A reward model that knows nothing yet."""
    folder = tmp_path_factory.mktemp("discriminator")
    tiny_runs.discriminator(tokenizer).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make(policy, folder, reward, *, method="d2po", rows=64, eval_rows=None, gold=toy.gold_helpfulness, **options):
    trainer_class, args = on_policy(method, folder, **{"num_generations": 2, "beta": 0.1, **options})
    if isinstance(reward, str):
        reward = {"type": "classifier", "path": reward}
    return trainer_class(policy, reward, args, prompts(rows), eval_rows, gold_reward=gold)


def test_with_a_gold_label_for_every_pair_it_is_online_dpo_on_the_gold_reward(policy, discriminator, tmp_path):
    common = {"max_steps": 4, "num_mini_batches": 2, "missing_eos_penalty": 0.5, "per_device_train_batch_size": 8}
    every = make(policy, tmp_path / "a", discriminator, gold_labels=1000, gold_label_every=1, **common)
    gold = make(policy, tmp_path / "b", toy.gold_helpfulness, method="online_dpo", gold=None, **common)
    every.train()
    gold.train()
    assert logged(every, "loss") == pytest.approx(logged(gold, "loss"), rel=1e-6) and logged(gold, "loss")[0] > 0
    for name, weight in parameters(gold.model).items():
        torch.testing.assert_close(parameters(every.model)[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_the_least_certain_pairs_of_a_cycles_beginning_are_labelled(policy, discriminator, tmp_path):
    asked = []

    def gold(completions, **columns):
        asked.append(len(completions))
        return wanted_words(completions)

    options = {"gold_labels": 3, "gold_label_every": 2, "gold_label_budget": 5, "max_steps": 8}
    trainer = make(policy, tmp_path, discriminator, gold=gold, per_device_train_batch_size=8, **options)
    before, chosen = parameters(trainer.discriminator.reward.model), []
    choose, learn = trainer.discriminator._choose, trainer.discriminator.learn

    def watched(pairs, indices, step, count):
        places = choose(pairs, indices, step, count)
        gaps = [one.score - other.score for one, other in zip(pairs[::2], pairs[1::2], strict=True)]
        kept = sorted(gap for gap, sample in zip(gaps, pairs[::2], strict=True) if not sample.left_out)
        assert sorted(gaps[place] for place in places) == kept[: len(places)]
        chosen.append(len(places))
        return places

    trainer.discriminator._choose = watched
    steps = []
    trainer.discriminator.learn = lambda pairs, step: (steps.append(step), learn(pairs, step))
    trainer.train()
    assert chosen == [3, 2] and asked == [6, 4] and steps == [0, 2]  # then the budget is spent
    assert logged(trainer, "discriminator/gold_labels") == [3, 5]
    after = parameters(trainer.discriminator.reward.model)
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_random_labels_are_of_other_pairs_and_do_not_depend_on_the_cut(policy, discriminator, tmp_path):
    found = []
    for cut in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        options = {"gold_labels": 4, "gold_label_choice": "random", "max_steps": 3, "gold_label_every": 1, **cut}
        trainer = make(policy, tmp_path, discriminator, **options)
        trainer.train()
        found.append([logged(trainer, "loss"), logged(trainer, "discriminator/loss")])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_the_discriminators_optimum_is_that_of_bradley_terry(policy, discriminator, tmp_path):
    """Of two answers of which the first is preferred three times in four, the scores differ by log 3."""
    options = {"discriminator_learning_rate": 3e-3, "discriminator_epochs": 60, "discriminator_batch_size": 4}
    trainer = make(policy, tmp_path, discriminator, **options)
    one, other = [5, 6, 7, 8], [5, 9, 10]
    trainer.discriminator.learn([GoldPair(0, one, other)] * 3 + [GoldPair(1, other, one)], step=0)
    scores = trainer.discriminator.reward.score_ids([one, other])
    assert (scores[0] - scores[1]).item() == pytest.approx(torch.tensor(3.0).log().item(), abs=0.02)


def test_a_limit_of_0_is_none(policy, discriminator, tmp_path):
    """`max_grad_norm: 0` to transformers; torch's clipping makes all gradients 0 of it."""
    learned = []
    for limit in (0.0, 1e6):
        trainer = make(policy, tmp_path, discriminator, max_grad_norm=limit)
        before = parameters(trainer.discriminator.reward.model)
        trainer.discriminator.learn([GoldPair(0, [5, 6, 7], [5, 9])], step=0)
        learned.append(parameters(trainer.discriminator.reward.model))
        assert any(not torch.equal(weight, before[name]) for name, weight in learned[-1].items())
    assert_same(*learned)


@pytest.mark.parametrize("rank", [None, 4])
def test_resuming_is_exact_and_the_discriminator_is_saved(rank, policy, discriminator, tmp_path):
    options = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gold_labels": 4, "gold_label_every": 1,
        "num_mini_batches": 2, "per_device_train_batch_size": 4, "discriminator_lora_r": rank,
        "discriminator_learning_rate": 3e-3,
    }  # fmt: skip

    def run(resume):
        trainer = make(policy, tmp_path, discriminator, rows=24, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-3"))
    assert_same(parameters(whole.model), parameters(resumed.model))
    learned = [parameters(trainer.discriminator.reward.model) for trainer in (whole, resumed)]
    assert_same(*learned)
    assert whole.discriminator.spent == resumed.discriminator.spent == 12
    ended = run(str(tmp_path / "checkpoint-6"))  # of a run that was killed before it saved the discriminator
    assert_same(parameters(ended.discriminator.reward.model), learned[0])
    whole.save_model()
    saved = build_reward({"type": "classifier", "path": str(tmp_path / "discriminator")})
    assert isinstance(saved, ClassifierReward)
    rows = [[5, 6, 7], [8, 9, 10, 11]]
    torch.testing.assert_close(saved.score_ids(rows), whole.discriminator.reward.score_ids(rows), rtol=1e-4, atol=1e-5)
    file = tmp_path / "checkpoint-3" / "discriminator.pt"
    state = torch.load(file, weights_only=True)
    state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
    torch.save(state, file)
    with pytest.raises(TrainingError, match="of an earlier version"):
        resumed.discriminator.load(file.parent)
    file.unlink()
    with pytest.raises(TrainingError):
        run(str(tmp_path / "checkpoint-3"))


def test_a_few_gold_labels_teach_the_discriminator_and_gold_rises(policy, discriminator, tmp_path):
    """From one that knows nothing, 16 labels a rollout: what it ranks by comes to agree with the gold reward, and the
    gold score of the evaluations rises."""
    options = {
        "max_steps": 12, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "gold_label_every": 1,
        "discriminator_learning_rate": 3e-3, "discriminator_batch_size": 4, "eval_strategy": "steps", "eval_steps": 12,
    }  # fmt: skip
    trainer = make(policy, tmp_path, discriminator, gold=wanted_words, eval_rows=prompts(48, seed=1), **options)
    trainer.train()
    lines = (tmp_path / "overoptimization.jsonl").read_text().splitlines()[1:]
    found = [json.loads(line)["per_prompt"] for line in lines]
    agreement = [np.corrcoef(of["gold"], of["proxy"])[0, 1] for of in found]
    assert abs(agreement[0]) < 0.2 and agreement[1] > 0.4, agreement
    assert np.mean(found[1]["gold"]) > np.mean(found[0]["gold"]) + 0.1
    assert trainer.discriminator.spent == 12 * 16


def test_two_processes_are_one(policy, discriminator, tmp_path):
    """Both label the same pairs and hold the same discriminator."""
    module = "tests.trainers.on_policy.d2po_ranks"
    run_ranks(module, str(policy), discriminator, str(tmp_path / "two"), logs=tmp_path / "logs")
    one = d2po_ranks.train(policy, discriminator, tmp_path / "one", 1)
    for rank in range(2):
        two = json.loads((tmp_path / f"two.{rank}.json").read_text())
        for key, values in one.items():
            assert two[key] == (values if key == "logged" else pytest.approx(values, rel=1e-4)), key
    assert one["discriminator/gold_labels"] == [3, 6]
    assert metrics_of(D2PO) == set(one["logged"]), "docs/online.md names other metrics"


def test_what_is_refused(policy, discriminator, tmp_path):
    with pytest.raises(ConfigError, match="D2PO needs gold_reward"):
        make(policy, tmp_path, discriminator, gold=None)
    for reward in (toy.gold, [{"type": "classifier", "path": discriminator}, toy.gold]):
        with pytest.raises(ConfigError, match="one reward of type classifier"):
            make(policy, tmp_path, reward)

    class Placed(ClassifierReward):
        placed = True

    for reward, message in (
        ({"type": "classifier", "path": discriminator, "offload": True}, "leave offload out"),
        (Placed(discriminator), "leave ranks out"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(policy, tmp_path, reward)
    for options, message in (
        ({"gold_labels": 0}, "gold_labels must be at least 1"),
        ({"gold_label_every": 0}, "gold_label_every must be at least 1"),
        ({"gold_label_choice": "any"}, "gold_label_choice cannot be 'any'; valid: uncertain, random"),
        ({"discriminator_learning_rate": -1.0}, "discriminator_learning_rate must be at least 0"),
        ({"rollouts_ahead": 1}, "rollouts_ahead: 1 has no effect here"),
    ):
        with pytest.raises(ConfigError, match=message):
            on_policy("d2po", tmp_path, num_generations=2, **options)
