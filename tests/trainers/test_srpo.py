"""SRPO: the three contexts of a pair, its loss on them, exact resumes, learning, and what is refused."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from align.errors import ConfigError, DataError
from align.objectives.srpo import RevisionRatios, srpo_losses
from align.trainers.srpo import REVISIONS, SRPOConfig, SRPOTrainer
from tests.reward_models import worlds
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import QUIET, assert_same, logged, parameters, tiny_model
from tests.warm import run_ranks


def make(policy, folder, rows=64, data=None, eval_rows=None, tokenizer=None, **options):
    given = {name: options.pop(name) for name in ("peft_config", "ref_model") if name in options}
    defaults = {"output_dir": str(folder), "max_length": 24, "max_steps": 2, "learning_rate": 1e-3}
    args = SRPOConfig(**{**QUIET, **defaults, "per_device_train_batch_size": 8, **options})
    return SRPOTrainer(policy, args, toy_pairs(rows) if data is None else data, eval_rows, tokenizer, **given)


def other(tokenizer):
    return tiny_model(tokenizer, seed=5)


# ---- contexts -------------------------------------------------------------------------------------------------------


def test_a_pair_has_three_prompts(policy, tokenizer, tmp_path):
    data = toy_pairs(8)
    trainer = make(policy, tmp_path, data=data, revision_template="{answer} thanks {prompt}")
    for row, text in zip(trainer.train_dataset, data, strict=True):
        assert tokenizer.decode(row["prompt_ids"]).split() == text["prompt"].split()
        for name, column in zip(("chosen", "rejected"), REVISIONS, strict=True):
            expected = f"{text[name]} thanks {text['prompt']}".split()
            assert tokenizer.decode(row[column]).split() == expected
    default = make(policy, tmp_path, data=data).train_dataset[0]
    words = tokenizer.decode(default["revise_rejected_ids"]).split()
    assert words == f"{data[0]['prompt']} {data[0]['rejected']} {data[0]['prompt']}".split()


def test_a_conversation_goes_on(tmp_path):
    tokenizer = worlds.tokenizer()
    ask = [{"role": "user", "content": "w1 w2"}]
    row = {
        "prompt": ask,
        **{n: [{"role": "assistant", "content": a}] for n, a in (("chosen", "w3"), ("rejected", "w4"))},
    }
    model = tiny_model(tokenizer, vocab_size=len(tokenizer))
    data = Dataset.from_list([row] * 8)
    trainer = make(model, tmp_path, data=data, tokenizer=tokenizer, revision_template="w9", max_length=40)
    found = trainer.train_dataset[0]
    talk = [*ask, row["rejected"][0], {"role": "user", "content": "w9"}]
    expected = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found["revise_rejected_ids"] == expected
    implicit = Dataset.from_list([{n: ask + row[n] for n in ("chosen", "rejected")}] * 8)
    again = make(model, tmp_path, data=implicit, tokenizer=tokenizer, revision_template="w9", max_length=40)
    assert again.train_dataset[0] == found
    with pytest.raises(ConfigError, match="would be written as it is"):
        make(model, tmp_path, data=data, tokenizer=tokenizer, revision_template="{answer} w9")
    two = Dataset.from_list([{**row, "chosen": 2 * row["chosen"]}] * 8)
    with pytest.raises(DataError, match="chosen has 2 messages of the assistant"):
        make(model, tmp_path, data=two, tokenizer=tokenizer)


def test_long_pairs_are_left_out_or_refused(policy, tmp_path, caplog):
    whole = make(policy, tmp_path, rows=16).train_dataset
    lengths = [
        max(len(row[c]) for c in REVISIONS) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in whole
    ]
    limit = sorted(lengths)[-2]
    kept = sum(length <= limit for length in lengths)
    with pytest.raises(DataError, match=f"{16 - kept} of 16 pairs have more than max_revision_length={limit}"):
        make(policy, tmp_path, rows=16, max_revision_length=limit)
    cut = make(policy, tmp_path, rows=16, max_revision_length=limit, max_bad_share=0.5).train_dataset
    assert cut["row"][:] == [row for row, length in zip(whole["row"], lengths, strict=True) if length <= limit]


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["shared_prefix", "padded"])
def test_the_loss_is_that_of_sequences_one_by_one(batching, policy, tokenizer, tmp_path):
    options = {"max_steps": 1, "beta": 0.3, "improver_weight": 0.3, "ref_model": other(tokenizer)}
    trainer = make(policy, tmp_path, rows=8, batching=batching, **options)
    start = {name: p.requires_grad_() for name, p in parameters(trainer.model).items()}
    trainer.train()

    def logp(model, weights, prompt, ids):
        whole = torch.tensor([prompt + ids])
        logits = torch.func.functional_call(model, weights, (whole,)).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()[None]  # a batch of one

    def ratio(row, context, answer):
        ids = row[f"{answer}_ids"]
        return (
            logp(trainer.model, start, row[context], ids) - logp(options["ref_model"], {}, row[context], ids).detach()
        )

    losses = []
    for row in trainer.train_dataset:
        ratios = RevisionRatios(
            chosen=ratio(row, "prompt_ids", "chosen"),
            rejected=ratio(row, "prompt_ids", "rejected"),
            chosen_again=ratio(row, "revise_chosen_ids", "chosen"),
            rejected_after_chosen=ratio(row, "revise_chosen_ids", "rejected"),
            chosen_after_rejected=ratio(row, "revise_rejected_ids", "chosen"),
            rejected_again=ratio(row, "revise_rejected_ids", "rejected"),
        )
        losses.append(srpo_losses(ratios, beta=0.3, improver_weight=0.3).losses)
    loss = torch.cat(losses).mean()
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(start.values()))]).norm().item()
    assert logged(trainer, "grad_norm")[0] == pytest.approx(norm, rel=1e-4)


def test_the_batch_may_be_cut_in_any_way(policy, tokenizer, tmp_path):
    found = []
    for cut in (
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "batching": "padded"},
        {"tokens_per_batch": 100},
        {"tokens_per_batch": 200, "batching": "padded"},
    ):
        options = {"max_steps": 3, "adam_epsilon": 0.1, "eval_strategy": "steps", "eval_steps": 3, **cut}
        trainer = make(policy, tmp_path, ref_model=other(tokenizer), eval_rows=toy_pairs(6, seed=1), **options)
        trainer.train()
        keys = ("loss", "grad_norm", "improver/loss", "generator/loss", "rewards/margins", "eval_loss")
        found.append({key: torch.tensor(logged(trainer, key)) for key in keys})
    for one in found[1:]:
        for key, values in one.items():
            torch.testing.assert_close(values, found[0][key], rtol=1e-4, atol=1e-5, msg=key)


def test_no_micro_batch_is_larger_than_its_budget(policy, tmp_path):
    for batching, budget in (("shared_prefix", 220), ("padded", 440)):
        trainer = make(policy, tmp_path, rows=32, batching=batching, tokens_per_batch=budget)
        rows = trainer.train_dataset.to_list()
        batches = trainer.planner.cut(rows)
        sizes = [trainer.planner.collate(batch)["input_ids"].numel() for batch in batches]
        assert max(sizes) <= budget and len(batches) < 32, sizes
        assert sorted(row["row"] for batch in batches for row in batch) == trainer.train_dataset["row"][:]


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_resuming_is_exact(adapter, policy, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if adapter else None

    def run(resume):
        trainer = make(policy, tmp_path, peft_config=lora, max_steps=5, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return parameters(trainer.model), logged(trainer, "loss")

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-2"))
    assert_same(whole[0], resumed[0])
    assert whole[1] == resumed[1]


def test_both_players_learn(policy, tmp_path):
    options = {"max_steps": 16, "per_device_train_batch_size": 32}
    trainer = make(policy, tmp_path, rows=128, eval_rows=toy_pairs(100, seed=1), **options)
    trainer.train()
    found, losses = trainer.evaluate(), logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.625, abs=1e-4)  # (1 + 1/4) / 2: policy and reference are the same
    assert losses[-1] < 0.2 and logged(trainer, "improver/accuracies")[-1] > 0.9, losses
    assert found["eval_rewards/accuracies"] > 0.55 and found["eval_improver/accuracies"] > 0.55, found


def test_two_processes_are_one(policy, tmp_path):
    from tests.trainers.pairs import srpo_ranks

    run_ranks("tests.trainers.pairs.srpo_ranks", str(policy), str(tmp_path / "two"), logs=tmp_path / "logs")
    one = srpo_ranks.train(policy, tmp_path / "one", 1)
    first, second = (json.loads((tmp_path / f"two.{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for key, values in one.items():
        assert first[key] == pytest.approx(values, rel=1e-4, abs=1e-5), key


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_refused(policy, tmp_path):
    for options, message in (
        ({"precompute_ref_log_probs": True}, "SRPO looks at them in three contexts"),
        ({"improver_weight": 1.0}, "improver_weight must be above 0 and below 1, got 1"),
        ({"improver_weight": 0.0}, "improver_weight must be above 0, got 0"),
        ({"revision_template": "{prompt} again"}, "shows no {answer}"),
        ({"max_revision_length": 0}, "max_revision_length must be at least 1"),
        ({"beta": 0.0}, "beta must be > 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(policy, tmp_path, **options)
    with pytest.raises(ConfigError, match="the rows are a stream"):
        make(policy, tmp_path, data=toy_pairs(16).to_iterable_dataset())
    tokens = make(policy, tmp_path).train_dataset
    assert len(make(policy, tmp_path, data=tokens).train_dataset) == len(tokens)  # tokenised ones are taken
    with pytest.raises(DataError, match="tokenised pairs need the columns revise_chosen_ids"):
        make(policy, tmp_path, data=tokens.remove_columns(REVISIONS))
