"""UFT: the loss of implicit rewards, and a trainer whose steps have its mean over sequences, however they are cut. Run
as a script on two processes: policy, folder."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from align.data import toy
from align.data.mixture import MixturePart, mix
from align.errors import ConfigError, DataError, TrainingError
from align.modeling.load import load_policy
from align.objectives.implicit_sft import implicit_reward_loss
from align.trainers.sft import SFTTrainer
from tests.trainers.core.test_experts import mixture
from tests.trainers.tiny_runs import assert_same, demonstrations, logged, parameters, sft_config, tiny_model
from tests.trainers.two_processes import run_on_two

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
BETA = 0.3
METRICS = ("rewards", "sigma", "logps", "token_loss")
NAMES = ("loss", "grad_norm", *(f"implicit/{name}" for name in METRICS))


def scored(count: int, seed: int = 0) -> Dataset:
    """Demonstrations with scores of 0, 0.25, 0.5, 0.75 and 1 (null)."""
    rows = demonstrations(count, seed)
    return rows.add_column("score", [(None, 0.25, 0.0, 0.75, 0.5)[i % 5] for i in range(count)])


def trainer(folder, data, *, model=None, ref_model=None, lora=False, evaluate=None, **options):
    tokenizer = toy.tokenizer()
    return SFTTrainer(
        tiny_model(tokenizer) if model is None else model,
        sft_config(folder, **{"implicit_reward_beta": BETA, **options}),
        data,
        evaluate,
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
        ref_model=ref_model,
    )


def steps(made) -> torch.Tensor:
    """What a run logs, [NAMES, steps]."""
    made.train()
    return torch.tensor([logged(made, name) for name in NAMES])


# ---- the function ----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers():
    logps, ref_logps = torch.tensor([-3.0, -5.0, -40.0, -2.0]), torch.tensor([-5.0, -5.0, -10.0, -4.0])
    losses, rewards = implicit_reward_loss(logps, ref_logps, torch.tensor([1.0, 1.0, 0.0, 0.5]), beta=0.5)
    assert rewards.tolist() == [1.0, 0.0, -15.0, 1.0]
    sigma = 1 / (1 + math.exp(-1))
    expected = [(sigma - 1) ** 2, 0.25, (1 / (1 + math.exp(15))) ** 2, (sigma - 0.5) ** 2]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert implicit_reward_loss(logps, ref_logps, 1.0, beta=0.5)[0][0].item() == pytest.approx(expected[0], rel=1e-6)


def test_its_gradient_is_that_of_the_docstring():
    torch.manual_seed(0)
    logps = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ref_logps, scores = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    losses, rewards = implicit_reward_loss(logps, ref_logps, scores, beta=0.7)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    sigma = rewards.sigmoid()
    torch.testing.assert_close(gradient, 2 * 0.7 * (sigma - scores) * sigma * (1 - sigma))
    same = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (start,) = torch.autograd.grad(implicit_reward_loss(same, same.detach(), 1.0, beta=0.01)[0].sum(), same)
    assert start.item() == pytest.approx(-0.25 * 0.01)


def test_the_optimum_of_a_score_is_its_logit():
    """Three sequences are scored; two take up what probability is left."""
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    ref_logps = torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3], dtype=torch.float64).log()
    scores = torch.tensor([0.8, 0.6, 0.5], dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        losses, _ = implicit_reward_loss(logits.log_softmax(0)[:3], ref_logps[:3], scores, beta=2.0)
        losses.mean().backward()
        return losses.mean()

    optimizer.step(loss)
    _, rewards = implicit_reward_loss(logits.log_softmax(0)[:3].detach(), ref_logps[:3], scores, beta=2.0)
    torch.testing.assert_close(rewards, scores.logit(), atol=1e-6, rtol=0)


# ---- a step ----------------------------------------------------------------------------------------------------------


def log_probs(model, rows) -> torch.Tensor:
    """Of whole sequences, row by row from full logits."""
    found = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        each = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        found.append(each[labels != -100].sum())
    return torch.stack(found)


def first_step(rows) -> list[float]:
    """What is logged of the first step, in float64 by autograd."""
    policy, reference = (tiny_model(toy.tokenizer(), seed=seed).double().eval() for seed in (0, 1))
    logps = log_probs(policy, rows)
    rewards = BETA * (logps - log_probs(reference, rows).detach())
    scores = torch.tensor([1.0 if row.get("score") is None else row["score"] for row in rows], dtype=torch.float64)
    loss = ((rewards.sigmoid() - scores) ** 2).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).norm()
    tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
    means = (rewards.mean(), rewards.sigmoid().mean(), logps.mean(), -logps.sum() / tokens)
    return [value.item() for value in (loss, norm, *means)]


@pytest.mark.parametrize("rows", [demonstrations, scored], ids=["demonstrations", "scored"])
def test_the_mean_over_the_sequences_of_a_step_however_it_is_cut(rows, policy, tmp_path):
    """13 rows: the second step has 5, which the cuts divide unevenly."""
    options = {"model": policy, "ref_model": tiny_model(toy.tokenizer(), seed=1)}
    data = rows(13)
    made = trainer(tmp_path, data.select(range(8)), per_device_train_batch_size=8, max_steps=1, **options)
    (first,) = steps(made).T.tolist()
    assert first == pytest.approx(first_step(made.train_dataset), rel=2e-4)
    cuts = ((8, 1), (4, 2), (2, 4), (1, 8))
    found = [
        steps(trainer(tmp_path, data, per_device_train_batch_size=a, gradient_accumulation_steps=b, **options))
        for a, b in cuts
    ]
    for cut in found[1:]:
        torch.testing.assert_close(cut, found[0], rtol=1e-4, atol=1e-6)


def test_batches_without_padding_are_the_same(policy, tmp_path):
    """Sequences that follow each other in one row, also packed into rows of 24 tokens."""
    options = {"model": policy, "ref_model": tiny_model(toy.tokenizer(), seed=1), "max_steps": 1}
    for data, cuts in ((scored(8), [{}]), (demonstrations(8), [{}, {"packing": True, "max_length": 24}])):
        padded = steps(trainer(tmp_path, data, **options))
        for cut in cuts:
            free = {"max_length": None, "padding_free": True, **cut}
            made = trainer(tmp_path, data, **options, **free)
            torch.testing.assert_close(steps(made), padded, rtol=1e-4, atol=1e-6)
            assert made.padding_free
    assert len(made.train_dataset) < 8


def test_two_processes_are_one(policy, tmp_path):
    one = two_steps(policy, tmp_path / "one", 1)
    for rank in run_on_two("tests.trainers.test_implicit_sft", tmp_path / "two", policy):
        torch.testing.assert_close(rank, one, rtol=1e-4, atol=1e-6)


def two_steps(policy: str, folder: Path, world: int) -> torch.Tensor:
    """The large epsilon keeps AdamW from making whole steps of rounding errors."""
    options = {"learning_rate": 5e-3, "adam_epsilon": 0.1, "gradient_accumulation_steps": 2}
    options |= {"model": policy, "per_device_train_batch_size": 4 // world}
    padded = trainer(folder, scored(16), **options)
    packed = trainer(folder, demonstrations(64), packing=True, max_length=40, **options)  # not as many in each process
    return torch.cat([steps(padded), steps(packed)])


@pytest.mark.parametrize("kind", ["full", "LoRA", "another dtype"])
def test_it_starts_at_its_reference_and_leaves_it(kind, policy, tmp_path):
    options = {"ref_dtype": "bfloat16"} if kind == "another dtype" else {}
    options |= {"model": policy, "max_steps": 8, "learning_rate": 1e-2}
    made = trainer(tmp_path, demonstrations(8), lora=kind == "LoRA", **options)
    assert made.implicit.reference.held.adapter_off == (kind == "LoRA")
    before = log_probs(made.implicit.reference.held.model, made.train_dataset).detach()
    found = dict(zip(NAMES, steps(made).tolist(), strict=True))
    rounding = 0.1 if kind == "another dtype" else 1e-5
    assert found["implicit/rewards"][0] == pytest.approx(0, abs=rounding)
    assert found["loss"][0] == pytest.approx(0.25, abs=rounding)
    assert found["implicit/rewards"][-1] > 1 and found["implicit/token_loss"][-1] < found["implicit/token_loss"][0]
    with made.implicit.reference.held.active() as reference:
        assert torch.equal(log_probs(reference, made.train_dataset), before)


def test_the_reference_has_no_dropout(tmp_path):
    """And the policy has: its rewards are not 0 in the first step, before which the two are compared without."""
    made = trainer(tmp_path, demonstrations(8), model=tiny_model(toy.tokenizer(), attention_dropout=0.5), max_steps=1)
    batch = made.data_collator([made.train_dataset[number] for number in range(8)])
    made.model.train()
    made.implicit.prepare(made.model, batches := [dict(batch)], made.args.device)
    expected = log_probs(tiny_model(toy.tokenizer()).eval(), made.train_dataset).detach()
    torch.testing.assert_close(batches[0]["implicit"].logps, expected, rtol=1e-5, atol=1e-5)
    assert made.model.training and steps(made)[NAMES.index("implicit/rewards")].abs().item() > 1e-3


def test_a_score_is_reached_and_not_passed(tmp_path):
    rows = demonstrations(1).add_column("score", [0.7])
    made = trainer(tmp_path, rows, max_steps=40, per_device_train_batch_size=1, learning_rate=5e-3)
    sigma = steps(made)[NAMES.index("implicit/sigma")]
    assert sigma[0].item() == 0.5 and sigma[-1].item() == pytest.approx(0.7, abs=0.02)


def test_evaluations_are_those_of_plain_fine_tuning(tmp_path):
    held_out = scored(6, seed=1)
    plain, ours = (
        trainer(tmp_path, scored(8), evaluate=held_out, implicit_reward_beta=beta).evaluate()["eval_loss"]
        for beta in (None, BETA)
    )
    assert ours == plain


def test_the_experts_are_balanced_too(tmp_path):
    tokenizer = toy.tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for cut in ((8, 1), (4, 2)):
        made = trainer(
            tmp_path, demonstrations(8), model=mixture(vocab_size=len(tokenizer), **ends), max_steps=1,
            router_aux_loss_coef=10.0, per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1],
        )  # fmt: skip
        made.train()
        assert logged(made, "loss")[0] == pytest.approx(0.25 + 10 * logged(made, "aux_loss")[0], rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_resumed_run_is_the_same_and_knows_its_reference(lora, policy, tmp_path):
    def run(resume, seed=None):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        reference = None if seed is None else tiny_model(toy.tokenizer(), seed=seed)
        made = trainer(tmp_path, scored(32), model=policy, ref_model=reference, lora=lora, **options)
        made.train(resume_from_checkpoint=resume)
        return made

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-2"))
    assert_same(parameters(whole.model), parameters(resumed.model))
    assert logged(whole, "implicit/rewards")[-1] != 0
    with pytest.raises(TrainingError, match=r"is of another run \(reference: None before"):
        run(str(tmp_path / "checkpoint-2"), seed=2)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_scores_come_with_every_kind_of_rows(tmp_path):
    """Text, streams, tokenised rows, a mixture with demonstrations, and texts that a function makes."""
    rows = scored(8)
    text = {"formatting_func": lambda row: row["prompt"] + row["completion"]}

    def scores_of(data, **arguments):
        options = {"implicit_reward_beta": BETA, "max_steps": 1}
        made = SFTTrainer(
            tiny_model(toy.tokenizer()), sft_config(tmp_path, **options), data, processing_class=toy.tokenizer(),
            **arguments,
        )  # fmt: skip
        return sorted(next(iter(made.get_train_dataloader()))["scores"].tolist())

    expected = sorted([1.0, 0.25, 0.0, 0.75, 0.5, 1.0, 0.25, 0.0])
    tokenised = trainer(tmp_path, rows).train_dataset
    parts = [(rows.select(range(4)), MixturePart(path="a")), (demonstrations(4, seed=1), MixturePart(path="b"))]
    assert scores_of(rows) == scores_of(tokenised) == scores_of(rows, **text) == expected
    stream = IterableDataset.from_generator(lambda: iter(list(rows)))
    assert scores_of(stream) == scores_of(stream, **text) == expected
    assert scores_of(mix(parts, 0)) == sorted([1.0, 0.25, 0.0, 0.75, *[1.0] * 4])


def test_scores_that_are_none_are_refused_by_row(tmp_path):
    for bad in (1.5, -0.1, math.nan):
        rows = demonstrations(8).add_column("score", [0.5] * 3 + [bad] + [1.0] * 4)
        with pytest.raises(DataError, match=r"score is not a number in \[0, 1\].*\brows? 3\b"):
            trainer(tmp_path, rows)
        tokenised = trainer(tmp_path, rows, implicit_reward_beta=None).train_dataset
        with pytest.raises(DataError, match=r"row 3 of the tokenised rows: score is not a number in \[0, 1\]"):
            trainer(tmp_path, tokenised)
    with pytest.raises(DataError, match="score is not a number"):
        trainer(tmp_path, demonstrations(8).add_column("score", ["good"] * 8))


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_what_is_refused(policy, tmp_path):
    data, tokenizer = demonstrations(8), toy.tokenizer()
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="implicit_reward_beta must be"):
            sft_config(tmp_path, implicit_reward_beta=beta)
    for problem, options in {
        "leave one of the two out": {"selective_tokens": 0.5},
        "loss_type: dft is another loss": {"loss_type": "dft"},
        "label_smoothing_factor is for the loss of tokens": {"label_smoothing_factor": 0.1},
        "packing_strategy: wrapped cuts sequences": {"packing": True, "packing_strategy": "wrapped"},
    }.items():
        with pytest.raises(ConfigError, match=problem):
            sft_config(tmp_path, implicit_reward_beta=0.01, **options)
    with pytest.raises(ConfigError, match="the rows' scores would be lost"):
        trainer(tmp_path, scored(8), packing=True)
    with pytest.raises(ConfigError, match="named twice"):
        trainer(tmp_path, data, ref_model=tiny_model(tokenizer), ref_model_name_or_path="x")
    moved = get_peft_model(load_policy(policy), LoraConfig(**LORA, init_lora_weights=False))
    with pytest.raises(TrainingError, match="before the first step the policy and its reference differ"):
        trainer(tmp_path, data, model=moved).train()


def test_the_memory_estimate_counts_a_reference_of_its_own(tmp_path):
    plain, ours = sft_config(tmp_path), sft_config(tmp_path, implicit_reward_beta=0.01)
    named = sft_config(tmp_path, implicit_reward_beta=0.01, ref_model_name_or_path="x")
    held = [config.holds_reference(adapter) for config in (plain, ours, named) for adapter in (False, True)]
    assert held == [False, False, True, False, True, True]


if __name__ == "__main__":
    found = two_steps(sys.argv[1], Path(sys.argv[2]), 2)
    torch.save(found, Path(sys.argv[2]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
