"""Resuming is bit-exact, and damaged checkpoints are seen."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from align.distributed.checkpoints import checksums, damage, newest_whole, write_manifest
from align.errors import DataError, TrainingError
from align.modeling.load import load_policy, load_tokenizer
from align.rollout import make_engine
from align.trainers.remax import ReMaxTrainer
from align.trainers.sft import SFTTrainer
from tests.trainers.tiny_runs import (
    assert_same,
    demonstrations,
    logged,
    needs_vllm,
    parameters,
    prompts,
    remax_config,
    sft_config,
    wanted_words,
)

GOLD = {"type": "rule", "function": "align.data.toy:gold", "name": "gold"}
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "lr_scheduler_type": "linear"}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
METRICS = ("loss", "grad_norm", "learning_rate")


def remax(model, folder, lora=False, engine=None, **options):
    """Three steps per epoch; evaluated at other steps than saved."""
    options = {
        "run_name": "run",
        "eval_strategy": "steps",
        "eval_steps": 4,
        "gradient_accumulation_steps": 2,
        **SAVED,
        **options,
    }
    args = remax_config(folder, per_device_train_batch_size=4, learning_rate=5e-3, **options)
    adapter = LoraConfig(**LORA) if lora else None
    data = prompts(22), prompts(6, seed=1)
    return ReMaxTrainer(model, wanted_words, args, *data, gold_reward=GOLD, peft_config=adapter, engine=engine)


def sft(model, folder, lora=False, **options):
    args = sft_config(folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, **{**SAVED, **options})
    return SFTTrainer(model, args, demonstrations(22), peft_config=LoraConfig(**LORA) if lora else None)


def evaluations(folder) -> list[str]:
    path = Path(folder) / "overoptimization.jsonl"
    return path.read_text().splitlines()[1:] if path.exists() else []


def copy_until(source, target, step) -> None:
    """What a run killed somewhere after its checkpoint of `step` has left."""
    shutil.copytree(source, target)
    for folder in target.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["sft", "sft LoRA", "remax", "remax LoRA"])
def finished(request, policy, tmp_path_factory):
    """How to make the trainer, a finished run of 8 steps of it, and that run's folder. Epochs have 3 steps."""
    make, lora = (sft if "sft" in request.param else remax), "LoRA" in request.param
    folder = tmp_path_factory.mktemp("straight")
    trainer = make(policy, folder, lora)
    trainer.train()
    return (lambda folder, **options: make(policy, folder, lora, **options)), trainer, folder


@pytest.mark.parametrize("step", [2, 6], ids=["within an epoch", "at its end"])
def test_resuming_is_exact(finished, step, tmp_path):
    make, straight, folder = finished
    copy_until(folder, tmp_path / "run", step)
    torch.manual_seed(99)
    resumed = make(tmp_path / "run")
    torch.rand(7)  # draws of others in between must not matter
    resumed.train(resume_from_checkpoint=True)
    assert_same(parameters(resumed.model), parameters(straight.model))
    for key in METRICS:
        assert len(logged(straight, key)) == 8 and logged(resumed, key) == logged(straight, key)
    assert evaluations(tmp_path / "run") == evaluations(folder)


def test_a_finished_run_is_left_alone(finished, tmp_path, caplog):
    make, straight, folder = finished
    copy_until(folder, tmp_path / "run", 8)
    resumed = make(tmp_path / "run")
    with caplog.at_level("INFO"):
        resumed.train(resume_from_checkpoint=True)
    assert "is finished already" in caplog.text and f"resuming from {tmp_path / 'run' / 'checkpoint-8'}" in caplog.text
    assert resumed.state.global_step == 8 and len(logged(resumed, "loss")) == 8
    assert_same(parameters(resumed.model), parameters(straight.model))
    assert evaluations(tmp_path / "run") == evaluations(folder)


def test_a_finished_run_can_be_made_longer(policy, tmp_path):
    """Constant learning rate: two steps and two more are four."""
    options = {"lr_scheduler_type": "constant", "eval_steps": 2, "max_steps": 4}
    straight = remax(policy, tmp_path / "straight", **options)
    straight.train()
    remax(policy, tmp_path / "run", **{**options, "max_steps": 2}).train()
    resumed = remax(policy, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(parameters(resumed.model), parameters(straight.model))
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "straight")


def test_a_curve_that_has_lost_evaluations_is_refused(finished, tmp_path):
    make, straight, folder = finished
    if not evaluations(folder):
        return
    copy_until(folder, tmp_path / "run", 6)
    path = tmp_path / "run" / "overoptimization.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:100])  # those of steps 0 and, in part, 4
    with pytest.raises(DataError, match="has lost evaluations that the run made before its checkpoint at step 6"):
        make(tmp_path / "run").train(resume_from_checkpoint=True)


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.vllm
@needs_vllm
def test_a_killed_run_resumes_with_vllm(policy, tmp_path):
    """Evaluated after the checkpoint and before the kill: those records are made again, and are the same. One engine
    serves all three trainers, and gets the weights of each when it is first used."""
    engine = make_engine(load_policy(policy), load_tokenizer(policy), backend="vllm", max_model_len=22)
    options = {"engine": engine, "max_steps": 4, "eval_steps": 1}
    straight = remax(policy, tmp_path / "straight", **options)
    straight.train()
    killed = remax(policy, tmp_path / "run", **options)
    killed.add_callback(Kill(4))  # before the evaluation and the checkpoint of this step
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert len(evaluations(tmp_path / "run")) == 4
    resumed = remax(policy, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    engine.close()
    assert resumed.resume_step == 2
    assert_same(parameters(resumed.model), parameters(straight.model))
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "straight")


# ---- damage ---------------------------------------------------------------------------------------------------------


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return "model.safetensors has 1000 bytes"


def flip_a_bit(folder):
    path = folder / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "optimizer.pt does not match its checksum"


def lose_the_manifest(folder):
    (folder / "align_manifest.json").unlink()
    return "no align_manifest.json"


def lose_a_file(folder):
    (folder / "scheduler.pt").unlink()
    return "scheduler.pt is missing"


@pytest.fixture(scope="module")
def checkpoints(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = sft(policy, folder)
    trainer.train()
    return folder, trainer


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, lose_the_manifest, lose_a_file])
def test_a_damaged_checkpoint_is_passed_over(harm, checkpoints, policy, tmp_path, caplog):
    folder, straight = checkpoints
    shutil.copytree(folder, tmp_path / "run")
    problem = harm(tmp_path / "run" / "checkpoint-8")
    resumed = sft(policy, tmp_path / "run")
    with pytest.raises(TrainingError, match=f"cannot resume from .*checkpoint-8: .*{problem}"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resume_step == 6
    assert f"Passing over the damaged checkpoint {tmp_path / 'run' / 'checkpoint-8'}: {problem}" in caplog.text
    assert_same(parameters(resumed.model), parameters(straight.model))
    files = json.loads((tmp_path / "run" / "checkpoint-8" / "align_manifest.json").read_text())["files"]
    assert "scheduler.pt" in files  # written anew, whole


def test_only_so_many_are_kept(policy, tmp_path):
    sft(policy, tmp_path, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_nothing_to_resume(policy, tmp_path):
    with pytest.raises(TrainingError, match="holds no undamaged checkpoint"):
        sft(policy, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(TrainingError, match="cannot resume from .*nowhere"):
        sft(policy, tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_checkpoint_without_the_optimiser(policy, tmp_path):
    sft(policy, tmp_path, max_steps=2, save_only_model=True).train()
    with pytest.raises(TrainingError, match="save_only_model"):
        sft(policy, tmp_path).train(resume_from_checkpoint=True)


def test_starting_again_beside_old_checkpoints_is_said(checkpoints, policy, tmp_path, caplog):
    shutil.copytree(checkpoints[0], tmp_path / "run")
    sft(policy, tmp_path / "run", save_strategy="no", max_steps=1).train()
    assert "holds checkpoint-2, checkpoint-4, checkpoint-6, checkpoint-8 of an earlier run" in caplog.text


def test_broken_weights_are_not_saved(policy, tmp_path):
    """A weight that turns infinite in the step before a checkpoint, when nothing has been logged yet."""

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.lm_head.weight[3, 5] = torch.inf

    trainer = sft(policy, tmp_path)
    trainer.add_callback(Break())
    with pytest.raises(TrainingError, match="the weights are not finite after step 4"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_another_reference_is_refused(policy, tmp_path):
    """The usual mistake: the run is started from its own checkpoint."""
    remax(policy, tmp_path, max_steps=2).train()
    trainer = remax(str(tmp_path / "checkpoint-2"), tmp_path)
    with pytest.raises(TrainingError, match="checkpoint-2 is of another run \\(model: "):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"[]",
        b"null",
        b'{"files": {}}',
        b'{"files": []}',
        b'{"files": {"a": 1}}',
        b"\xff\xfe",
        b"",
        b"[" * 100_000,
    ],
)
def test_a_manifest_that_is_none(content, tmp_path):
    (tmp_path / "a").write_text("content")
    (tmp_path / "align_manifest.json").write_bytes(content)
    assert "align_manifest.json" in damage(tmp_path)


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path):
    """Or it has changed nothing that counts (white space); never a traceback."""
    for name in ("model.safetensors", "optimizer.pt", "ein_übel.json"):
        (tmp_path / name).write_text(f"content of {name}")
    write_manifest(tmp_path)
    path = tmp_path / "align_manifest.json"
    whole, draw, passed = path.read_bytes(), random.Random(0), 0
    listed = json.loads(whole)
    for _ in range(500):
        data = bytearray(whole)
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        if damage(tmp_path) is None:
            passed += 1
            assert json.loads(data) == listed
    assert passed < 250


def test_what_is_no_folder_is_passed_over(tmp_path, caplog):
    whole = tmp_path / "checkpoint-1"
    whole.mkdir()
    (whole / "a").write_text("content")
    write_manifest(whole)
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "gone")
    (tmp_path / "checkpoint-3").write_text("a file")
    (tmp_path / "checkpoint-4" / "align_manifest.json").mkdir(parents=True)
    assert newest_whole(tmp_path) == whole
    assert all(f"checkpoint-{number}" in caplog.text for number in (2, 3, 4))


def test_processes_share_the_checksums(tmp_path):
    for number in range(7):
        (tmp_path / f"file{number}").write_bytes(b"x" * (1 + 100 * number))
    shares = [checksums(tmp_path, rank=rank, processes=3) for rank in range(3)]
    assert sorted(len(share) for share in shares) == [2, 2, 3]
    write_manifest(tmp_path, {name: entry for share in shares for name, entry in share.items()})
    assert damage(tmp_path) is None
