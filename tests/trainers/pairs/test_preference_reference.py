"""Cached reference log-probs are the live ones, are kept on disk, and are not used for anything else."""

import multiprocessing

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from align.errors import ConfigError, TrainingError
from align.modeling.load import freeze_copy, load_policy, load_tokenizer
from align.trainers.dpo import DPOTrainer
from align.trainers.pairs.data import flat_column, list_column
from align.trainers.pairs.reference_cache import ReferenceCache
from align.trainers.pairs.reference_file import COLUMNS, write
from tests.trainers.pairs.preference_runs import assert_close, dpo_config, history, toy_pairs
from tests.trainers.tiny_runs import logged, parameters

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def pairs():
    return toy_pairs(24)


def run(policy, args, pairs, *evaluate, **options):
    trainer = DPOTrainer(policy, args, pairs, *evaluate, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [None, LORA])
def test_cached_is_live(lora, policy, pairs, tmp_path):
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "learning_rate": 5e-3}
    data = pairs, toy_pairs(10, seed=1)
    live = run(policy, dpo_config(tmp_path / "live", **settings), *data, peft_config=lora)
    args = dpo_config(tmp_path / "cached", precompute_ref_log_probs=True, precompute_ref_batch_size=5, **settings)
    cached = run(policy, args, *data, peft_config=lora)
    names = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected")
    assert_close(history(cached, *names), history(live, *names), rtol=1e-5, atol=2e-6)
    assert logged(cached, "eval_loss") == pytest.approx(logged(live, "eval_loss"), rel=1e-5)
    assert (cached.reference is None) == (
        lora is None
    )  # a model of its own is not kept, an adapter can be switched off
    assert not logged(cached, "time/reference") and logged(live, "time/reference")


def test_the_cache_is_read_again_and_notices_changes(policy, pairs, tmp_path, caplog):
    caplog.set_level("INFO")

    def files(model=policy, data=pairs, **options):
        args = dpo_config(
            tmp_path / "run", precompute_ref_log_probs=True, ref_log_probs_dir=str(tmp_path / "shared"), **options
        )
        caplog.clear()
        DPOTrainer(model, args, data, processing_class=load_tokenizer(policy))
        return {path.name for path in (tmp_path / "shared").iterdir()}

    first = files()
    assert len(first) == 1 and "are read from" not in caplog.text and "computed anew" not in caplog.text
    stored = Dataset.from_file(str(tmp_path / "shared" / next(iter(first))))
    assert files(seed=7, learning_rate=1.0, per_device_train_batch_size=2) == first and "are read from" in caplog.text
    other_data = files(data=pairs.select(range(20)))
    assert len(other_data) == 2 and "of other data or of another reference" in caplog.text
    longer = files(max_length=12)
    assert len(longer) == 3
    moved = load_policy(policy)
    moved.lm_head.weight.data[0, 0] += 1e-3
    assert len(files(model=moved)) == 4
    for column in COLUMNS:
        assert all(logp < 0 for row in stored[column] for logp in row)


def test_a_damaged_cache_is_an_error(policy, pairs, tmp_path):
    args = dpo_config(tmp_path, precompute_ref_log_probs=True)
    DPOTrainer(policy, args, pairs)
    (path,) = (tmp_path / "ref_log_probs").iterdir()
    rows = [[np.array(row[column], np.float32) for column in COLUMNS] for row in Dataset.from_file(str(path))]
    write(path, [rows[:-1]])
    with pytest.raises(TrainingError, match="delete it"):
        DPOTrainer(policy, args, pairs)
    rows[-1][0][-1] = -50.0  # a wrong number that somebody wrote
    write(path, [rows])
    with pytest.raises(TrainingError, match="the policy and its reference differ by"):
        run(policy, dpo_config(tmp_path, precompute_ref_log_probs=True, per_device_train_batch_size=24), pairs)


def test_other_pairs_are_evaluated_with_the_adapter_off(policy, pairs, tmp_path):
    lora = DPOTrainer(policy, dpo_config(tmp_path, precompute_ref_log_probs=True), pairs, peft_config=LORA)
    assert lora.evaluate(toy_pairs(4, seed=3))["eval_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_resumed_run_needs_the_same_pairs_and_reference(policy, pairs, tmp_path):
    settings = {"precompute_ref_log_probs": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run(policy, dpo_config(tmp_path, **settings), pairs)
    fewer = DPOTrainer(policy, dpo_config(tmp_path, **settings), pairs.select(range(16)))
    with pytest.raises(TrainingError, match="is of another run .data:"):
        fewer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_columns_of_lists(pairs, tmp_path, policy):
    trainer = DPOTrainer(policy, dpo_config(tmp_path), pairs)
    rows = trainer.train_dataset.select([5, 2, 9])
    lengths, values = flat_column(rows, "chosen_ids")
    assert [list(part) for part in np.split(values, np.cumsum(lengths)[:-1])] == list(rows["chosen_ids"])
    assert list_column(values, lengths).to_pylist() == [list(map(float, row)) for row in rows["chosen_ids"]]


def test_a_reference_in_bfloat16(policy, pairs, tmp_path):
    settings = {"max_steps": 2, "learning_rate": 5e-3}
    whole = run(policy, dpo_config(tmp_path / "a", **settings), pairs)
    half = run(policy, dpo_config(tmp_path / "b", ref_dtype="bfloat16", **settings), pairs)
    assert {p.dtype for p in half.ref_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    tied = load_policy(policy)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    twin = freeze_copy(tied, torch.bfloat16)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert {b.dtype for b in twin.buffers()} == {b.dtype for b in tied.buffers()}
    found, expected = (history(trainer, "loss", "rewards/margins") for trainer in (half, whole))
    assert_close(found, expected, rtol=0.05, atol=0.02)
    assert not torch.equal(found["rewards/margins"], expected["rewards/margins"])
    named = DPOTrainer(policy, dpo_config(tmp_path / "c", ref_dtype="bfloat16", ref_model_name_or_path=policy), pairs)
    assert torch.equal(*(t.ref_model.get_input_embeddings().weight for t in (named, half)))


@pytest.mark.parametrize(
    "options, more, sentence",
    [
        ({"ref_dtype": "bf16"}, {}, "ref_dtype must be one of bfloat16, float16, float32, got 'bf16'"),
        ({"ref_dtype": "bfloat16", "precompute_ref_log_probs": True}, {}, "no reference is held"),
        ({"ref_dtype": "bfloat16"}, {"peft_config": LORA}, "the reference is the policy with its adapter off"),
        ({"ref_dtype": "bfloat16", "loss_type": "simpo"}, {}, "this loss has no reference"),
    ],
)
def test_a_dtype_that_no_reference_has(options, more, sentence, policy, pairs, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        DPOTrainer(policy, dpo_config(tmp_path, **options), pairs, **more)


def test_three_runs_write_into_one_folder_at_once(tmp_path):
    """Each computes and writes the same file; none fails, none reads half a file, nothing is left over."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    rows = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}] * 500)

    def compute(shards):
        barrier.wait(30)  # all three have found no file
        for row in range(500):
            values = np.arange(2 * row, 2 * row + 2, dtype=np.float32)
            shards.append(row, values, np.array([row], dtype=np.float32))
        shards.close()

    def one_run():
        found = ReferenceCache(tmp_path / "shared", "weights", "float32").add_to(rows, "train", compute)
        assert found["ref_chosen_logps"][499] == [998, 999] and found["ref_rejected_logps"][499] == [499]

    runs = [context.Process(target=one_run) for _ in range(3)]
    for process in runs:
        process.start()
    for process in runs:
        process.join(60)
    assert [process.exitcode for process in runs] == [0, 0, 0]
    assert len(list((tmp_path / "shared").iterdir())) == 1


def test_other_pairs_are_evaluated_with_a_cached_reference_until_the_policy_moves(policy, pairs, tmp_path):
    other = toy_pairs(6, seed=1)
    live = DPOTrainer(policy, dpo_config(tmp_path / "live"), pairs)
    cached = DPOTrainer(policy, dpo_config(tmp_path / "cached", precompute_ref_log_probs=True), pairs, {"own": other})
    expected, found = live.evaluate(other), cached.evaluate(other)
    assert cached.reference is None and found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    cached.train()
    assert cached.evaluate()["eval_own_loss"] != pytest.approx(expected["eval_loss"], rel=1e-6)
    with pytest.raises(ConfigError, match="Cannot compute reference log-probs for a dataset passed to"):
        cached.evaluate(other)


def test_a_moving_reference_is_mixed_and_resumed(policy, pairs, tmp_path):
    settings = {"max_steps": 5, "sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2}

    def trained(folder, resume=None, **options):
        args = dpo_config(tmp_path / folder, **{**settings, **options})
        trainer = DPOTrainer(policy, args, pairs)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    start = parameters(load_policy(policy))
    short = trained("short", max_steps=2)  # moves once, after its last step
    for name, weight in parameters(short.ref_model).items():
        torch.testing.assert_close(weight, 0.75 * start[name] + 0.25 * short.model.get_parameter(name), msg=name)
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trained("whole", **saving)
    again = trained("whole", resume=str(tmp_path / "whole" / "checkpoint-3"), **saving)
    for name, weight in parameters(whole.ref_model).items():
        assert torch.equal(weight, again.ref_model.get_parameter(name)), name
    assert logged(whole, "loss")[3:] == logged(again, "loss")[-2:]
    for options, problem in (
        ({"precompute_ref_log_probs": True}, "holds no reference that could move"),
        ({"loss_type": ["simpo"]}, "holds no reference that could move"),
        ({"ref_model_mixup_alpha": 0.0}, "above 0 and at most 1"),
        ({"sync_ref_model": False}, "only with sync_ref_model"),
    ):
        with pytest.raises(ConfigError, match=problem):
            dpo_config(tmp_path / "bad", **{**settings, **options})
    with pytest.raises(ConfigError, match="adapter off"):
        DPOTrainer(policy, dpo_config(tmp_path / "lora", **settings), pairs, peft_config=LORA)
