"""Rho-1: the tokens of a step whose loss is most above the reference's are trained, however the step is cut."""

import random

import pytest
import torch
from peft import LoraConfig

from align.data import toy
from align.errors import ConfigError, DataError, TrainingError
from align.modeling.logprobs import token_logps
from align.objectives.selective import excess_loss, selection_threshold
from align.trainers.sft import SFTTrainer
from tests.trainers.tiny_runs import assert_same, demonstrations, logged, parameters, sft_config, tiny_model

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def trainer(folder, data, *, model=None, ref_model=None, lora=False, evaluate=None, **options):
    tokenizer = toy.tokenizer()
    return SFTTrainer(
        tiny_model(tokenizer) if model is None else model,
        sft_config(folder, **options),
        data,
        evaluate,
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
        ref_model=tiny_model(tokenizer, seed=1) if ref_model is None else ref_model,
    )


def test_the_largest_excess_losses_are_chosen():
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]).log_softmax(0)
    ref_logps = logps + torch.tensor([0.1, -0.3, 0.7, 0.7, 0.2])
    excess = excess_loss(logps, ref_logps)
    for share, chosen in ((1.0, 5), (0.7, 4), (0.6, 3), (0.5, 2), (0.4, 2), (0.2, 2), (1e-6, 2)):  # 2 and 3 tie
        assert int((excess >= selection_threshold(excess, share)).sum()) == chosen, share
    assert (excess >= selection_threshold(excess, 0.6)).tolist() == [False, False, True, True, True]


def selected_loss(rows, share: float) -> tuple[float, list[float]]:
    """The loss of the first step and what is logged, row by row with the log-probs of the library."""
    models = [tiny_model(toy.tokenizer(), seed=seed).eval() for seed in (0, 1)]
    found: list[list] = [[], []]
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        mask = torch.tensor([[label != -100 for label in row["labels"]]])
        for logps, model in zip(found, models, strict=True):
            logps.append(token_logps(model, ids, torch.ones_like(ids), mask=mask).detach()[mask[:, 1:]])
    policy, reference = (torch.cat(logps) for logps in found)
    order = (reference - policy).argsort(descending=True)
    kept = order[: round(share * len(order))]
    excess = reference - policy
    log = [len(kept) / len(order), excess[kept].mean().item(), excess.mean().item(), -policy.mean().item()]
    return -policy[kept].mean().item(), log


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_the_loss_is_that_of_the_selected_tokens_however_the_step_is_cut(lora, policy, tmp_path):
    data = demonstrations(16)

    def steps(**cut):
        made = trainer(tmp_path, data, model=policy, lora=lora, selective_tokens=0.55, max_steps=2, **cut)
        made.train()
        names = ("kept", "excess_loss", "excess_loss_of_all", "loss_of_all")
        names = ("loss", "grad_norm", *(f"selective/{name}" for name in names))
        return made, torch.tensor([logged(made, name) for name in names])

    made, whole = steps(per_device_train_batch_size=16)
    loss, log = selected_loss(made.train_dataset, 0.55)
    assert whole[0, 0].item() == pytest.approx(loss, rel=1e-4)
    assert whole[2:, 0].tolist() == pytest.approx(log, rel=1e-4)
    assert {"time/select", "time/reference"} <= set(made.state.log_history[0])
    for cut in (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    ):
        torch.testing.assert_close(steps(**cut)[1], whole, rtol=1e-4, atol=1e-6)


def test_a_share_of_one_is_plain_fine_tuning_and_evaluations_are_of_all_tokens(tmp_path):
    data, held_out = demonstrations(16), demonstrations(8, seed=1)
    runs = {}
    for name, options in {"plain": {}, "all": {"selective_tokens": 1.0}, "half": {"selective_tokens": 0.5}}.items():
        runs[name] = SFTTrainer(
            tiny_model(toy.tokenizer()),
            sft_config(tmp_path, **options),
            data,
            held_out,
            processing_class=toy.tokenizer(),
            ref_model=tiny_model(toy.tokenizer(), seed=1) if options else None,
        )
    start = {name: run.evaluate()["eval_loss"] for name, run in runs.items()}
    assert start["half"] == start["plain"]
    for run in runs.values():
        run.train()
    assert_same(parameters(runs["all"].model), parameters(runs["plain"].model))
    assert logged(runs["all"], "loss") == logged(runs["plain"], "loss")
    assert logged(runs["half"], "loss")[0] != logged(runs["plain"], "loss")[0]


def test_packed_rows_are_ranked_too(tmp_path):
    data = demonstrations(24)
    options = {"packing": True, "max_length": 48, "selective_tokens": 0.5, "per_device_train_batch_size": 4}
    made = trainer(tmp_path, data, **options)
    made.train()
    assert len(made.train_dataset) < len(data)
    assert logged(made, "selective/kept")[0] == pytest.approx(0.5, abs=0.01)
    assert logged(made, "selective/excess_loss")[0] > logged(made, "selective/excess_loss_of_all")[0] + 0.5


def test_a_resumed_run_is_the_same_and_knows_its_reference(tmp_path):
    def run(resume, seed=1):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "selective_tokens": 0.5}
        made = trainer(tmp_path, demonstrations(32), ref_model=tiny_model(toy.tokenizer(), seed=seed), **options)
        made.train(resume_from_checkpoint=resume)
        return made

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-2"))
    assert_same(parameters(whole.model), parameters(resumed.model))
    with pytest.raises(TrainingError, match="is of another run .reference: "):
        run(str(tmp_path / "checkpoint-2"), seed=2)


def test_noise_in_the_text_is_passed_over(tmp_path):
    """Three words in ten are replaced at random: a reference of a little clean text selects few of them."""
    tokenizer, rng = toy.tokenizer(), random.Random(0)
    rows = demonstrations(64, seed=1)
    reference = SFTTrainer(
        tiny_model(tokenizer),
        sft_config(tmp_path, max_steps=15, learning_rate=1e-2, per_device_train_batch_size=16),
        rows,
        processing_class=tokenizer,
    )
    reference.train()
    made = trainer(tmp_path, rows, ref_model=reference.model, selective_tokens=0.5)
    batch = made.data_collator([made.train_dataset[number] for number in range(64)])
    before, known = batch["labels"].clone(), len(tokenizer)
    noise = (before != -100) & (torch.rand(before.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    for place in noise.nonzero().tolist():
        batch["labels"][tuple(place)] = batch["input_ids"][tuple(place)] = rng.randrange(known)
    batches = [batch]
    made.selection.narrow(made.model, batches)
    kept = batches[0]["labels"] != -100
    assert kept.sum() / (before != -100).sum() == pytest.approx(0.5, abs=0.01)
    assert noise[kept].float().mean() < 0.3 * noise[before != -100].float().mean()


def test_what_is_refused(tmp_path):
    data, tokenizer = demonstrations(8), toy.tokenizer()

    def plain(ref_model=None, **options):
        return SFTTrainer(
            tiny_model(tokenizer),
            sft_config(tmp_path, **options),
            data,
            processing_class=tokenizer,
            ref_model=ref_model,
        )

    for share in (0.0, 1.2, float("nan")):
        with pytest.raises(ConfigError, match="selective_tokens must be"):
            sft_config(tmp_path, selective_tokens=share)
    for options in ({"ref_model_name_or_path": "x"}, {"ref_dtype": "bfloat16"}):
        with pytest.raises(ConfigError, match="has a reference only with selective_tokens"):
            sft_config(tmp_path, **options)
    with pytest.raises(ConfigError, match="ref_model: supervised .* only with selective_tokens"):
        plain(tiny_model(tokenizer))
    with pytest.raises(ConfigError, match="selective_tokens needs a reference"):
        plain(selective_tokens=0.5)
    with pytest.raises(ConfigError, match="named twice"):
        plain(tiny_model(tokenizer), selective_tokens=0.5, ref_model_name_or_path="x")
    with pytest.raises(DataError, match="token"):
        plain(tiny_model(tokenizer, vocab_size=10, eos_token_id=1, pad_token_id=0), selective_tokens=0.5)
    for options in ({}, {"bf16": True, "ref_dtype": "bfloat16"}):  # the second one differs by rounding
        same = plain(tiny_model(tokenizer), selective_tokens=0.5, **options)
        with pytest.raises(TrainingError, match="A reference that is the policy selects by rounding errors"):
            same.train()
