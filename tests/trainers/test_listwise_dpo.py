"""DPO on rankings: the probability of a ranking by hand, two answers are DPO, layouts, cache, resumes, bad lists."""

import itertools
import math

import pytest
import torch
from datasets import Dataset

from align.data import BadRows, toy
from align.data.ranked import answers_of, tokenize_ranked
from align.errors import DataError
from align.objectives.plackett_luce import listwise_losses, plackett_luce
from align.trainers.dpo import DPOTrainer
from align.trainers.listwise_dpo import ListwiseDPOConfig, ListwiseDPOTrainer, answer_logps
from tests.trainers.pairs.preference_runs import dpo_config, history, toy_pairs
from tests.trainers.tiny_runs import QUIET, assert_same, logged, parameters, tiny_model


def rankings(count: int, most: int = 5) -> Dataset:
    """Lists of two to `most` answers to the toy world's prompts, scored by length: none of the same."""
    rows = []
    for number, row in enumerate(toy.reference_text(toy.split_prompts(0, count)[0], 1, 0)[:count]):
        words = row["completion"].split() * 3
        own = [" " + " ".join(words[: i + 1]) for i in range(2 + number % (most - 1))]
        order = sorted(range(len(own)), key=lambda i: (i * 7 + number) % 5)
        scores = [float(i % 3 * 10 + i) for i in order]
        rows.append({"prompt": row["prompt"], "completions": [own[i] for i in order], "scores": scores})
    return Dataset.from_list(rows)


def make(folder, rows, policy=None, **options):
    defaults = {"per_device_train_batch_size": 8, "max_length": 40, "max_steps": 3, "learning_rate": 2e-3, "beta": 0.3}
    args = ListwiseDPOConfig(**{**QUIET, "output_dir": str(folder), **defaults, **options})
    tokenizer = toy.tokenizer()
    policy = tiny_model(tokenizer) if policy is None else policy
    return ListwiseDPOTrainer(policy, args, rows, None, tokenizer, tiny_model(tokenizer, seed=5))


def test_the_probabilities_of_all_rankings_sum_to_one():
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)
    orders = list(itertools.permutations(range(4)))
    losses = plackett_luce(rewards[torch.tensor(orders)], torch.ones(24, 4))
    assert losses.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)
    by_hand = sum(math.log(sum(math.exp(r) for r in rewards[k:].tolist())) - rewards[k].item() for k in range(4))
    assert losses[0].item() == pytest.approx(by_hand, abs=1e-12)


def test_two_are_sigmoid_and_the_gradients_of_a_list_sum_to_zero():
    rewards = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    listed = torch.arange(5) < torch.tensor([2, 5, 3, 4, 5, 2])[:, None]
    losses = plackett_luce(rewards.masked_fill(~listed, float("nan")), listed)
    for row in (0, 5):
        expected = -torch.nn.functional.logsigmoid(rewards[row, 0] - rewards[row, 1])
        torch.testing.assert_close(losses[row], expected, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), rewards)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (gradient[~listed] == 0).all() and (gradient[:, 0] < 0).all()
    shorter = plackett_luce(rewards[2:3, :3], torch.ones(1, 3))
    torch.testing.assert_close(losses[2:3], shorter)


def test_what_is_logged_of_a_list():
    logps = torch.tensor([[3.0, 1.0, 2.0], [0.0, 4.0, 9.0]])
    listed = torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = listwise_losses(logps, torch.zeros(2, 3), listed, beta=0.5).values()
    assert found["rewards/chosen"].tolist() == [1.5, 0.0] and found["rewards/rejected"].tolist() == [0.75, 2.0]
    torch.testing.assert_close(found["rewards/accuracies"], torch.tensor([2 / 3, 0.0]))
    tokens = torch.tensor([[1.0, 2, 0, 0], [5, 0, 0, 0], [1, 10, 20, 100], [7, 7, 0, 0]])
    sums = answer_logps(tokens, torch.tensor([[2, 1, 2, 1], [1, 2, 0, 0]]))
    assert sums.tolist() == [[3, 1, 30, 100], [5, 14, 0, 0]]


@pytest.mark.parametrize("batching", ["padded", "shared_prefix"])
def test_lists_of_two_are_dpo(batching, tmp_path):
    """The same losses, rewards and weights as `DPOTrainer` on the pairs, step by step."""
    options = {"max_steps": 2, "beta": 0.3, "optim": "sgd", "learning_rate": 0.05, "batching": batching}
    ours = make(tmp_path / "lists", toy_pairs(24), **options)
    ours.train()
    args, tokenizer = dpo_config(tmp_path / "dpo", **options), toy.tokenizer()
    dpo = DPOTrainer(tiny_model(tokenizer), args, toy_pairs(24), None, tokenizer, tiny_model(tokenizer, seed=5))
    dpo.train()
    expected = history(dpo)
    for name, values in history(ours).items():
        torch.testing.assert_close(values, expected[name], rtol=2e-5, atol=2e-6, msg=name)
    for name, weight in parameters(dpo.model).items():
        torch.testing.assert_close(parameters(ours.model)[name], weight, rtol=0, atol=2e-5, msg=name)


def test_neither_layout_nor_cuts_nor_a_cached_reference_change_a_number(tmp_path):
    """Nor that each answer is in a forward pass of its own, by transformers alone."""
    runs, rows = [], rankings(24)
    for number, options in enumerate((
        {"batching": "padded"},
        {"batching": "shared_prefix"},
        {"batching": "shared_prefix", "tokens_per_batch": 60},
        {"batching": "padded", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"batching": "shared_prefix", "precompute_ref_log_probs": True},
    )):  # fmt: skip
        trainer = make(tmp_path / str(number), rows, optim="sgd", learning_rate=0.05, max_steps=2, **options)
        first = trainer.train_dataset[0]
        trainer.train()
        runs.append((history(trainer), parameters(trainer.model)))
    for found, weights in runs[1:]:
        for name, values in found.items():
            torch.testing.assert_close(values, runs[0][0][name], rtol=2e-4, atol=2e-5, msg=name)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, runs[0][1][name], rtol=0, atol=2e-5, msg=name)
    policy, reference = tiny_model(toy.tokenizer()), tiny_model(toy.tokenizer(), seed=5)
    trainer = make(tmp_path / "one", rows, policy=policy)
    batch = trainer._prepare_inputs(trainer.planner.collate([first]))
    loss = trainer.pair_losses(trainer.model, batch).losses.item()

    def logp(model, answer):
        ids = torch.tensor([first["prompt_ids"] + answer])
        with torch.no_grad():
            found = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
        return found[-len(answer) :].sum()

    rewards = torch.stack([0.3 * (logp(policy.eval(), a) - logp(reference.eval(), a)) for a in answers_of(first)])
    assert loss == pytest.approx(plackett_luce(rewards[None], torch.ones(1, len(rewards))).item(), rel=1e-5)


def test_the_reference_moves_with_sync_ref_model(tmp_path):
    trainer = make(tmp_path, toy_pairs(16), sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    trainer.train()
    first, *later = logged(trainer, "loss")
    assert abs(first - math.log(2)) > 1e-3 and later == pytest.approx([math.log(2)] * 2, abs=1e-5)


def test_a_resumed_run_is_the_same(tmp_path):
    def run(resume):
        trainer = make(tmp_path, rankings(24), max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return parameters(trainer.model), logged(trainer, "loss")

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-2"))
    assert_same(whole[0], resumed[0])
    assert whole[1] == resumed[1]


def test_rows(caplog):
    tokenizer = toy.tokenizer()
    rows = [
        {"prompt": "rose", "completions": [" wave", " chord", " spice"], "scores": [1.0, 3.0, 2.0]},
        {"prompt": "rose", "completions": [" wave", " chord", " spice", " ridge"], "scores": [1.0, 3.0, 1.0, 2.0]},
        {"prompt": "rose", "completions": [" wave", " chord"], "scores": [1.0, 1.0]},
        {"prompt": "rose", "completions": [" wave wave", " wave chord", " ridge"], "scores": [3.0, 2.0, 1.0]},
    ]
    report = BadRows()
    found = tokenize_ranked(Dataset.from_list(rows), tokenizer, max_length=None, report=report, max_bad_share=0.5)
    texts = [[tokenizer.decode(ids[:-1]).strip() for ids in answers_of(row)] for row in found]
    assert texts[:2] == [["chord", "spice", "wave"], ["chord", "ridge", "wave"]] and len(texts) == 3
    assert "a ranking has no ties" in report.summary() and "scores are all the same" in report.summary()
    longest = len(tokenizer("rose")["input_ids"]) + 1
    with pytest.raises(DataError, match="two answers are the same tokens"):
        tokenize_ranked(Dataset.from_list(rows[3:]), tokenizer, max_length=longest)


def test_tokenised_lists_are_checked(tmp_path):
    good = {"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8, 1, 9, 9, 1], "lengths": [2, 2, 3]}
    assert len(make(tmp_path, Dataset.from_list([good] * 8)).train_dataset) == 8
    for change, said in (
        ({"lengths": [2, 2, 2]}, "are not those of chosen_ids and rejected_ids"),
        ({"lengths": [2, 0, 5]}, "a list has two answers or more"),
        ({"prompt_ids": [5] * 39}, "ends beyond max_length=40"),
    ):
        with pytest.raises(DataError, match=said):
            make(tmp_path, Dataset.from_list([{**good, **change}]))
