"""`num_logged_completions` of SFT, DPO and KTO: what the policy answers at evaluations, shown and kept."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from align.errors import ConfigError, TrainingError
from align.evaluation.completions_file import FILE_NAME, CompletionsWriter, read_completions
from align.evaluation.metrics_file import MetricsWriter
from align.evaluation.watch import snapshot
from align.trainers.dpo import DPOTrainer
from align.trainers.kto import KTOConfig, KTOTrainer
from align.trainers.sft import SFTTrainer
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import QUIET, demonstrations, sft_config
from tests.warm import run_ranks

SHOWN = {"num_logged_completions": 3, "max_new_tokens": 7}
RUN = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 5e-3, "eval_on_start": True}


def sft(policy, folder, **options):
    return SFTTrainer(policy, sft_config(folder, **RUN, **options), demonstrations(24), demonstrations(6, seed=1))


def dpo(policy, folder, **options):
    return DPOTrainer(policy, dpo_config(folder, **RUN, **options), toy_pairs(16), toy_pairs(6, seed=1))


def dpo_with_an_adapter(policy, folder, **options):
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    args = dpo_config(folder, **{**RUN, "learning_rate": 5e-2}, **options)
    return DPOTrainer(policy, args, toy_pairs(16), toy_pairs(6, seed=1), peft_config=lora)


def kto(policy, folder, **options):
    args = KTOConfig(output_dir=str(folder), max_length=32, **QUIET, **RUN, **options)
    return KTOTrainer(policy, args, toy_pairs(16), toy_pairs(6, seed=1))


def answer(model, tokenizer, prompt: str) -> tuple[str, bool]:
    """The likeliest token after the whole text so far, again and again: no cache, no batch, no padding."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) - start < SHOWN["max_new_tokens"]:
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(ids[start:]), True
        ids.append(token)
    while ids[-1] == tokenizer.pad_token_id:  # is shown by nobody
        ids.pop()
    return tokenizer.decode(ids[start:]), False


@pytest.mark.parametrize("make", [sft, dpo, dpo_with_an_adapter, kto])
def test_answers_are_those_of_the_model_at_that_step(make, policy, tokenizer, tmp_path, capsys):
    trainer = make(policy, tmp_path, **SHOWN)
    trainer.train()
    first, _, last = records = read_completions(tmp_path)
    assert [record["step"] for record in records] == [0, 2, 4]
    model = trainer.model.eval()
    with torch.no_grad():
        for sample in last["samples"]:
            assert (sample["completion"], sample["ended"]) == answer(model, tokenizer, sample["prompt"])
    assert len({sample["prompt"] for sample in last["samples"]}) == 3
    assert [s["completion"] for s in first["samples"]] != [s["completion"] for s in last["samples"]]
    prompt = last["samples"][0]["prompt"]
    shown = snapshot(tmp_path)["samples"]
    assert list(shown)[0] == prompt and [entry["step"] for entry in shown[prompt]] == [0, 2, 4]
    assert f"---- step 4\n{prompt}\n>>>> {last['samples'][0]['completion']}" in capsys.readouterr().out


def test_two_processes_write_what_one_writes(policy, tmp_path):
    """Three prompts on two processes: one has a prompt twice, and the order is that of the data."""
    from tests.trainers.core.completion_ranks import METHODS, train

    train(policy, tmp_path / "one", 1)
    script = "tests.trainers.core.completion_ranks"
    first, second = run_ranks(script, policy, str(tmp_path / "two"), logs=tmp_path / "logs")
    for name in METHODS:
        one, two = (read_completions(tmp_path / folder / name) for folder in ("one", "two"))
        assert [record["step"] for record in two] == [0, 2, 4] and len(two[0]["samples"]) == 3
        assert [record["samples"] for record in two] == [record["samples"] for record in one]
    assert first.count("---- step") == 3 * 3 * len(METHODS) and "---- step" not in second


def test_training_is_the_same_with_them(policy, tmp_path):
    trained = [sft(policy, tmp_path / str(len(shown)), **shown) for shown in ({}, SHOWN)]
    for trainer in trained:
        trainer.train()
    plain, shown = (dict(trainer.model.named_parameters()) for trainer in trained)
    assert all(torch.equal(plain[name], shown[name]) for name in plain)
    assert not (tmp_path / "0" / FILE_NAME).exists()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    writer = CompletionsWriter(tmp_path, None)
    for step in (2, 4, 6):
        writer.write(step, [{"prompt": "a", "completion": str(step), "ended": True}])
    with open(writer.path, "a") as file:
        file.write('{"step": 8, "sam')  # a killed process leaves half a line
    assert CompletionsWriter(tmp_path, 4).last_step == 4
    assert [record["step"] for record in read_completions(tmp_path)] == [2, 4]
    CompletionsWriter(tmp_path, None)
    assert read_completions(tmp_path) == []


@pytest.mark.parametrize("line", ["\0\0\0\n", '{"step": null, "samples": []}\n'])
def test_a_damaged_file_keeps_no_run_from_being_resumed(line, tmp_path, caplog):
    writer = CompletionsWriter(tmp_path, None)
    writer.write(2, [])
    with open(writer.path, "a") as file:
        file.write(line)
    assert CompletionsWriter(tmp_path, 4).last_step is None
    assert read_completions(tmp_path) == [] and (tmp_path / "completions.1.old.jsonl").exists()
    assert "line 3 is not" in caplog.text


def test_a_full_disk_is_said_with_the_file(tmp_path):
    for writer, values in ((CompletionsWriter(tmp_path, None), (2, [])), (MetricsWriter(tmp_path, {}, None), ({},))):
        writer.path = Path("/dev/full")
        with pytest.raises(TrainingError, match="/dev/full cannot be written: No space left"):
            writer.write(*values)


def test_what_has_no_prompts_is_refused(policy, tmp_path):
    text = Dataset.from_list([{"text": row["completion"]} for row in demonstrations(8)])
    for rows, options, message in (
        (None, {}, "asks evaluation prompts, and there are none"),
        (text, {}, "no evaluation row has a prompt"),
        (demonstrations(4), {"max_new_tokens": 64}, "leaves room for max_new_tokens 64 of 64 tokens"),
    ):
        args = sft_config(tmp_path, **{**SHOWN, **options})
        with pytest.raises(ConfigError, match=message):
            SFTTrainer(policy, args, demonstrations(8), rows)
