"""KTOTrainer: against TRL's on the same batch, and what must not change its numbers."""

import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Value
from transformers import TrainerCallback

from align.data import toy
from align.data.unpaired import mismatched, tokenize_unpaired
from align.errors import ConfigError, DataError
from align.objectives.kto import kto_losses, weight_advice
from align.trainers.kto import KTOConfig, KTOTrainer, side
from align.trainers.pairs.data import flat_column
from tests.trainers.pairs.preference_runs import history, toy_pairs
from tests.trainers.tiny_runs import QUIET, assert_same, parameters, tiny_model

NAMES = ("loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen")


def answers(count: int) -> Dataset:
    """Rows of `prompt`, `completion`, `label`: two desirable to one undesirable."""
    rows = []
    for number, pair in enumerate(toy_pairs(count)):
        good = number % 3 != 2
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good})
    return Dataset.from_list(rows)


def kto(folder, rows=None, eval_rows=None, policy=None, peft_config=None, callbacks=None, **options):
    """A trainer whose reference is another model, so that the reference point is far from 0."""
    tokenizer = toy.tokenizer()
    defaults = {"per_device_train_batch_size": 8, "max_length": 32, "max_steps": 3, "learning_rate": 2e-3, "beta": 0.3}
    args = KTOConfig(**{**QUIET, "output_dir": str(folder), **defaults, "undesirable_weight": 2.0, **options})
    policy = tiny_model(tokenizer) if policy is None else policy
    reference = None if peft_config else tiny_model(tokenizer, seed=5)
    rows = answers(24) if rows is None else rows
    return KTOTrainer(policy, args, rows, eval_rows, tokenizer, reference, peft_config, callbacks)


def run(folder, **options) -> tuple[dict, dict]:
    """What was logged and the final weights. By SGD, whose weights differ as the gradients do: AdamW's first step makes
    the rounding of a gradient near 0 as large as any other."""
    trainer = kto(folder, optim="sgd", learning_rate=0.05, **options)
    trainer.train()
    return history(trainer, *NAMES), parameters(trainer.model)


def assert_equal_runs(one, other, rtol=2e-5) -> None:
    for name, values in one[0].items():
        assert len(values)
        torch.testing.assert_close(other[0][name], values, rtol=rtol, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    for name, weight in one[1].items():
        torch.testing.assert_close(other[1][name], weight, rtol=0, atol=2e-5, msg=name)


def test_loss_and_gradient_are_trls(tmp_path):
    import trl

    ours = kto(tmp_path / "ours", gradient_accumulation_steps=1)
    rows = [ours.train_dataset[i] for i in range(8)]
    batch = ours._prepare_inputs(ours.planner.collate(rows))
    args = trl.KTOConfig(
        **{**QUIET, "output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": 8, "beta": 0.3},
        undesirable_weight=2.0, bf16=False, gradient_checkpointing=False, max_length=32,
    )  # fmt: skip
    model, reference = tiny_model(toy.tokenizer()), tiny_model(toy.tokenizer(), seed=5)
    theirs = trl.KTOTrainer(model, reference, args, train_dataset=answers(24), processing_class=toy.tokenizer())
    inputs = {"label": batch["label"].bool()}
    for which, prefix in ((0, ""), (1, "KL_")):
        part = side(batch, which)
        inputs |= {f"{prefix}{name}": part[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    theirs.model.train()
    expected = theirs._compute_loss(theirs.model, inputs, False)
    expected.backward()

    ours.state.max_steps, ours.model_wrapped = 1, ours.model  # as transformers begins
    lists, count = ours.get_batch_samples(iter([ours.data_collator(rows)]), 1, "cpu")
    loss = ours.compute_loss(ours.model, ours._prepare_inputs(lists[0][0]), num_items_in_batch=count)
    loss.backward()
    assert theirs._metrics["train"]["kl"][0] > 0.1
    torch.testing.assert_close(lists[0][0]["kl"].item(), theirs._metrics["train"]["kl"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    grads = {name: p.grad for name, p in theirs.model.named_parameters()}
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"tokens_per_batch": 50},
        {"precompute_ref_log_probs": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_micro_batches_and_the_cache_do_not_change_a_run(options, whole, tmp_path):
    assert (whole[0]["kl"] > 0.1).sum() >= 2  # of three steps
    assert_equal_runs(whole, run(tmp_path / "other", **options))


def test_an_evaluation_does_not_depend_on_its_batches(tmp_path):
    found = []
    for size in (3, 8):
        trainer = kto(tmp_path, eval_rows=answers(7), per_device_eval_batch_size=size)
        found.append({k: v for k, v in trainer.evaluate().items() if "per_second" not in k and "runtime" not in k})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["eval_kl"] > 0.1
    values = {name: torch.from_numpy(column).double() for name, column in trainer.evaluator.values.items()}
    point = values["others"].mean()
    args = trainer.args
    weights = {name: getattr(args, name) for name in ("desirable_weight", "undesirable_weight")}
    losses = kto_losses(values["reward"] / args.beta, values["label"], point, beta=args.beta, **weights)
    assert (found[0]["eval_kl"], found[0]["eval_loss"]) == pytest.approx((point.item(), losses.mean().item()), rel=1e-5)
    trained = trainer.predict(answers(24)).metrics
    assert trained["test_loss"] != pytest.approx(found[0]["eval_loss"], rel=1e-3)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2
        return control


def test_resume_is_exact_with_an_adapter(policy, tmp_path):
    from peft import LoraConfig

    def config():
        return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}
    whole = kto(tmp_path / "whole", policy=policy, peft_config=config(), **options)
    whole.check_start = False  # the adapter is drawn: policy and reference differ
    whole.train()
    first = kto(tmp_path / "parts", policy=policy, peft_config=config(), callbacks=[StopAt()], **options)
    first.check_start = False
    first.train()
    second = kto(tmp_path / "parts", policy=policy, peft_config=config(), **options)
    second.check_start = False
    second.train(resume_from_checkpoint=True)
    assert_same(parameters(second.model), parameters(whole.model))
    assert history(second, *NAMES)["kl"][-1] == history(whole, *NAMES)["kl"][-1] > 0


def test_pairs_are_two_answers_each(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        paired = kto(tmp_path, rows=toy_pairs(6))
    assert "6 preference pairs are trained as 12 answers" in caplog.text
    rows = [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
            for side in ("chosen", "rejected") for p in toy_pairs(6)]  # fmt: skip
    written = kto(tmp_path, rows=Dataset.from_list(rows))
    names = ["prompt_ids", "chosen_ids", "rejected_ids", "label"]
    assert paired.train_dataset.select_columns(names).to_list() == written.train_dataset.select_columns(names).to_list()
    assert paired.train_dataset["row"] == [*range(6)] * 2


def test_every_answer_is_given_to_another_prompt():
    def partners_of(prompts):
        return mismatched(np.array([len(prompt) for prompt in prompts]), np.concatenate(prompts))

    prompts = [[7], [8], [7], [7, 8], [7], [8], [7, 8], [7, 8]] * 9
    partners = partners_of(prompts)
    assert all(prompts[i] != prompts[j] for i, j in enumerate(partners))
    assert np.array_equal(partners, partners_of(prompts)) and len(set(partners.tolist())) > 0.5 * len(prompts)
    distinct = partners_of([[i] for i in range(50)])
    assert sorted(distinct.tolist()) == list(range(50))
    with pytest.raises(DataError, match="all rows have the same prompt"):
        partners_of([[7]] * 4)


def test_answers_to_other_prompts_are_cut_to_what_fits(tmp_path):
    trainer = kto(tmp_path, max_length=14)
    data = trainer.train_dataset
    lengths = [len(row["prompt_ids"]) + len(row["rejected_ids"]) for row in data]
    assert max(lengths) == 14 and min(len(row["rejected_ids"]) for row in data) > 0
    partners = mismatched(*flat_column(data, "prompt_ids"))
    for row, partner in zip(data, partners, strict=True):
        assert row["rejected_ids"] == data[int(partner)]["chosen_ids"][: len(row["rejected_ids"])]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": None}, "label is missing: 1 (row 1)"),
        ({"label": 0.5}, "label is 0.5 instead of true (desirable) or false: 1 (row 1)"),
        ({"completion": " "}, "completion is empty: 1 (row 1)"),
    ],
)
def test_bad_rows_are_named(change, reason):
    rows = answers(3).to_list()
    rows = [{**row, "label": float(row["label"])} for row in rows]
    rows[1] |= change
    with pytest.raises(DataError) as error:
        tokenize_unpaired(Dataset.from_list(rows), toy.tokenizer(), max_length=None)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "names", [["bad", "good"], ["good", "bad"], ["Chosen", "Rejected"], ["Thumbs-Down", "thumbs up"]]
)
@pytest.mark.parametrize("tokenised", [False, True])
def test_a_class_label_is_read_by_its_names(names, tokenised):
    rows = [{"prompt": "a ", "completion": f"b{i}", "label": i % 2} for i in range(4)]
    if tokenised:
        rows = [{"prompt_ids": [3], "completion_ids": [4 + row["label"]], "label": row["label"]} for row in rows]
    dataset = Dataset.from_list(rows).cast_column("label", ClassLabel(names=names))
    read = tokenize_unpaired(dataset, toy.tokenizer(), max_length=32)
    first = names[0].lower() in ("good", "chosen")
    assert read["label"][:] == [first, not first] * 2 and read.features["label"] == Value("bool")


@pytest.mark.parametrize("names", [["alpha", "beta"], ["good", "better"], ["bad", "neutral", "good"]])
def test_a_class_label_whose_names_do_not_say_is_refused(names):
    rows = Dataset.from_list([{"prompt": "a ", "completion": f"b{i}", "label": i % 2} for i in range(4)])
    with pytest.raises(DataError, match=f"the names {', '.join(names)}, which do not say what is desirable: name"):
        tokenize_unpaired(rows.cast_column("label", ClassLabel(names=names)), toy.tokenizer(), max_length=32)


def test_rows_without_labels_and_streams_are_refused(tmp_path):
    with pytest.raises(DataError, match="no column 'label'"):
        tokenize_unpaired(answers(3).remove_columns("label"), toy.tokenizer(), max_length=None)
    with pytest.raises(ConfigError, match="the rows are a stream"):
        kto(tmp_path, rows=answers(8).to_iterable_dataset())
    with pytest.raises(ConfigError, match="loss_type cannot be 'bco'; valid: kto, apo_zero_unpaired"):
        KTOConfig(loss_type="bco", use_cpu=True)


def test_weights_are_advised_by_the_counts(tmp_path, caplog):
    assert weight_advice(10, 10, 1, 1) is None and weight_advice(30, 10, 1, 3) is None
    advice = weight_advice(30, 10, 1, 1)
    for weights in ((0.334, 1), (0.444, 1), (1, 2.26), (1, 2.99)):  # inside what it says
        assert weight_advice(30, 10, *weights) is None
    assert "desirable_weight to 0.333 ... 0.444, or undesirable_weight to 2.25 ... 3" in advice
    assert "no row is undesirable" in weight_advice(4, 0, 1, 1)
    kto(tmp_path, undesirable_weight=1.0)
    assert "16 desirable and 8 undesirable rows" in caplog.text


def test_the_unpaired_apo_zero_is_kto_without_a_reference_point():
    ratios, labels = torch.tensor([0.7, -1.2, 2.0, 0.1]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    losses = kto_losses(ratios, labels, 0.0, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    s = torch.sigmoid(0.3 * ratios)
    torch.testing.assert_close(losses, torch.where(labels == 1, 1.5 * (1 - s), 0.5 * s))


def test_its_reference_moves(tmp_path):
    """`sync_ref_model`, as in DPO."""
    settings = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2}
    trainer = kto(tmp_path, optim="sgd", learning_rate=0.05, **{**settings, "max_steps": 2})
    start = {name: weight.clone() for name, weight in parameters(trainer.ref_model).items()}
    trainer.train()
    for name, weight in parameters(trainer.ref_model).items():
        expected = 0.75 * start[name] + 0.25 * trainer.model.get_parameter(name)
        torch.testing.assert_close(weight, expected, msg=name)
    assert any(not torch.equal(weight, start[name]) for name, weight in parameters(trainer.ref_model).items())
