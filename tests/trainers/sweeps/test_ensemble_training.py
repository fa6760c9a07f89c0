"""Five members from one pass are the members that five passes would make, and load as one reward."""

import json
import os
import shutil
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from align.errors import ConfigError, RewardError
from align.modeling.load import load_sequence_classifier
from align.modeling.member_lora import add_member_adapters
from align.modeling.members import Members, share_trunk
from align.reward_models.base import RewardBatch
from align.reward_models.classifier import ClassifierReward
from align.reward_models.ensemble import load_ensemble
from align.reward_models.normalizer import Normalizer
from align.trainers.reward import RewardTrainer
from align.trainers.sweeps.ensemble import train_reward_ensemble
from align.trainers.sweeps.joint_ensemble import JointRewardTrainer
from tests.modeling import tiny
from tests.reward_models import worlds
from tests.trainers.reward_runs import config, logged, pairs
from tests.trainers.two_processes import run_on_two

BATCH = RewardBatch(["w1 ", "w2 "], ["w3 w4", "w20 w9"])
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A causal language model of two layers without a score head, float32."""
    folder = tmp_path_factory.mktemp("lm")
    tiny.causal(dtype=torch.float32, initializer_range=0.1, hidden_size=32).save_pretrained(folder)
    worlds.tokenizer().save_pretrained(folder)
    return str(folder)


def joint_model(folder, kind, seeds, **options):
    model = load_sequence_classifier(folder)
    return add_member_adapters(model, LORA, seeds) if kind == "lora" else share_trunk(model, seeds, 1, **options)


def trained(folder, kind, seeds, output, **options):
    args = config(output, num_train_epochs=1, max_grad_norm=0.05, logging_steps=1, **options)
    trainer = JointRewardTrainer(joint_model(folder, kind, seeds), args, pairs(48), pairs(20, seed=1))
    trainer.train()
    return trainer


def own_state(model, index):
    return {
        name: (p[index] if "lora_" in name else p).detach()
        for name, p in model.named_parameters()
        if p.requires_grad and ("lora_" in name or f".members.{index}." in name)
    }


@pytest.mark.parametrize("kind", ["lora", "shared_trunk"])
def test_one_pass_trains_each_member_as_alone(kind, trunk, tmp_path):
    """The same data order and seeds, gradients clipped hard at every step."""
    together = trained(trunk, kind, [7, 8, 9], tmp_path / "all")
    assert min(logged(together, "grad_norm")) > 0.1
    for i in range(3):
        alone = trained(trunk, kind, [7 + i], tmp_path / "one")
        for a, b in zip(own_state(together.model, i).values(), own_state(alone.model, 0).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert logged(together, f"loss/member_{i}") == pytest.approx(logged(alone, "loss"), rel=1e-4)
        assert together.normalizers[i].mean == pytest.approx(alone.normalizers[0].mean, abs=1e-4)
    sums = sum(torch.tensor(logged(together, f"loss/member_{i}")) for i in range(3))
    torch.testing.assert_close(torch.tensor(logged(together, "loss")), sums, rtol=1e-4, atol=1e-3)


def test_a_trunk_that_is_trained_gets_every_members_gradient(trunk, tmp_path):
    model = joint_model(trunk, "shared_trunk", [1, 2], train_trunk=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = JointRewardTrainer(model, config(tmp_path, max_steps=2), pairs(48), pairs(20, seed=1))
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "model.layers.0.mlp.up_proj.weight" in moved and any(".members.1." in name for name in moved)


@pytest.mark.parametrize("kind", ["lora", "shared_trunk"])
def test_saved_and_loaded(kind, trunk, tmp_path):
    options = {"peft_config": LORA} if kind == "lora" else {"upper_layers": 1}
    args = config(tmp_path / "rm", num_train_epochs=6, seed=3, eval_strategy="epoch")
    folder = train_reward_ensemble(trunk, args, pairs(160), pairs(60, seed=1), members=3, kind=kind, **options)
    ensemble = load_ensemble(folder, "uwo", lambda_=0.5, device="cpu")
    output = ensemble.score(BATCH)
    assert {f"member/{i}" for i in range(3)} | {"members_mean", "variance"} == set(output.extras) and output.extras[
        "variance"
    ].all()
    good = ensemble.score(RewardBatch(["w7 "] * 2, ["w1 w2 w3", "w20 w21"])).scores
    assert good[0] > good[1]
    assert [Normalizer.load(folder / f"member_{i}").count for i in range(3)] == [120] * 3
    if kind == "lora":  # a member's folder is a reward model by itself
        alone = ClassifierReward(str(folder / "member_1"), device="cpu").score(BATCH).scores
        torch.testing.assert_close(alone, output.extras["member/1"], rtol=0, atol=1e-4)
    saved = json.loads((folder / "ensemble.json").read_text())
    assert saved["kind"] == kind and saved.get("upper_layers") == options.get("upper_layers")
    written = (folder / "ensemble.json").stat().st_mtime_ns
    train_reward_ensemble(trunk, args, pairs(160), pairs(60, seed=1), members=3, kind=kind, resume=True, **options)
    assert (folder / "ensemble.json").stat().st_mtime_ns == written


class Weights(TrainerCallback):
    """dtypes of the weights of each run, by whether they are trained; and the smallest share of a trained one that
    moved."""

    def __init__(self):
        self.frozen, self.trained, self.moved = set(), set(), 1.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.trained |= {p.dtype for p in model.parameters() if p.requires_grad}
        self.frozen |= {p.dtype for p in model.parameters() if not p.requires_grad}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        weights = dict(model.named_parameters())
        self.moved = min(self.moved, *((weights[n] != p).float().mean().item() for n, p in self.before.items()))


@pytest.mark.parametrize("kind, autocast", [("lora", True), ("lora", False), ("separate", True)])
def test_adapters_on_weights_in_bfloat16(kind, autocast, trunk, tmp_path):
    """As of a 7B model: the frozen weights stay as they are loaded, adapters and heads are trained in float32."""
    options = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": autocast, "learning_rate": 1e-6}
    args = config(tmp_path / "rm", max_steps=4, lr_scheduler_type="constant", **options)
    seen = Weights()
    folder = train_reward_ensemble(trunk, args, pairs(64), members=2, kind=kind, peft_config=LORA, callbacks=[seen])
    assert (seen.frozen, seen.trained) == ({torch.bfloat16}, {torch.float32}) and seen.moved > 0.9
    together = load_ensemble(folder, "mean", device="cpu", dtype="float32").score(BATCH).extras
    for i in range(2):
        member = folder / f"member_{i}"
        assert {value.dtype for value in load_file(member / "adapter_model.safetensors").values()} == {torch.float32}
        alone = ClassifierReward(str(member), device="cpu", dtype="float32").score(BATCH).scores
        torch.testing.assert_close(alone, together[f"member/{i}"], rtol=0, atol=1e-4)


def test_loading_options_reach_a_shared_trunk(trunk, tmp_path):
    options = {"members": 2, "kind": "shared_trunk", "upper_layers": 1}
    with pytest.raises(ConfigError, match="others are to be trained in torch.bfloat16.*load the model in float32"):
        args = config(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
        train_reward_ensemble(trunk, args, pairs(8), **options)


def test_members_name_their_base_by_its_absolute_path(trunk, tmp_path, monkeypatch):
    """Read from a folder that has another model of that name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trunk, "base")
    args = config("runs/rm", max_steps=1)
    train_reward_ensemble("base", args, pairs(16), members=2, kind="lora", peft_config=LORA)
    expected = load_ensemble("runs/rm", "mean", device="cpu").score(BATCH).scores
    other = tmp_path / "elsewhere"
    tiny.causal(dtype=torch.float32, initializer_range=0.3, hidden_size=32).save_pretrained(other / "base")
    worlds.tokenizer().save_pretrained(other / "base")
    monkeypatch.chdir(other)
    assert torch.equal(load_ensemble("../runs/rm", "mean", device="cpu").score(BATCH).scores, expected)


def test_metrics(trunk, tmp_path, caplog):
    """Soft labels; what is logged is of the members' mean, and of each."""
    data = pairs(16, chosen_prob=0.25)
    args = config(tmp_path, max_steps=1, logging_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = JointRewardTrainer(joint_model(trunk, "shared_trunk", [1, 2, 3]), args, data, data)
    assert "batches are padded" not in caplog.text  # they always are, which nobody need be warned of
    trainer.train()
    metrics = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    for name in ("loss", "rewards/chosen"):
        each = [metrics[f"eval_{name}/member_{i}"] for i in range(3)]
        assert metrics[f"eval_{name}"] == pytest.approx(sum(each) / (1 if name == "loss" else 3), rel=1e-4)
    accuracies = [
        metrics["eval_rewards/accuracies"],
        *(metrics[f"eval_rewards/accuracies/member_{i}"] for i in range(3)),
    ]
    assert all(0.25 <= value <= 0.75 for value in accuracies)
    assert metrics["eval_rewards/margins_std"] > 0 and metrics["eval_calibration_error"] >= 0


@pytest.mark.parametrize("kind", ["lora", "shared_trunk"])
def test_resume_is_exact(kind, trunk, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "per_device_train_batch_size": 8}
    data = pairs(30)
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        trainer = JointRewardTrainer(joint_model(trunk, kind, [1, 2]), config(tmp_path, **options), data, data)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(a, b)
    assert runs[0].normalizers == runs[1].normalizers


def two_steps(folder, kind, batch, output, **options):
    args = config(
        output, per_device_train_batch_size=batch, max_steps=2, logging_steps=1, max_grad_norm=0.05, **options
    )
    trainer = JointRewardTrainer(joint_model(folder, kind, [1, 2]), args, pairs(16), pairs(8, seed=1))
    trainer.train()
    values = [torch.tensor(logged(trainer, key)[:2]) for key in ("loss", "loss/member_1", "grad_norm")]
    return [*values, torch.tensor([n.mean for n in trainer.normalizers])]


def on_one_rank(folder, output):
    """What a process of `test_two_processes_are_one` does, of which this file is the main module."""
    values = [two_steps(folder, kind, 4, output, ddp_backend="gloo") for kind in ("lora", "shared_trunk")]
    torch.save(values, f"{output}/rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(trunk, tmp_path):
    expected = [two_steps(trunk, kind, 8, tmp_path / "one") for kind in ("lora", "shared_trunk")]
    for found in run_on_two("tests.trainers.sweeps.test_ensemble_training", tmp_path / "two", str(trunk)):
        for values, wanted in zip(found, expected, strict=True):
            for value, other in zip(values, wanted, strict=True):
                torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


def test_separate_members(trunk, tmp_path, caplog):
    args = config(tmp_path / "rm", num_train_epochs=1)
    with caplog.at_level("INFO"):
        folder = train_reward_ensemble(trunk, args, pairs(48), pairs(20, seed=1), members=2)
    assert f"{folder / 'member_1'}: seed {args.seed + 1}" in caplog.text
    output = load_ensemble(folder, "uwo", lambda_=0.5, device="cpu").score(BATCH)
    assert not torch.allclose(output.extras["member/0"], output.extras["member/1"])
    assert json.loads((folder / "ensemble.json").read_text())["members"] == ["member_0", "member_1"]
    # the heads are those of the seeds, and a single run with the second seed is the second member
    single = RewardTrainer(
        trunk, config(tmp_path / "one", num_train_epochs=1, seed=args.seed + 1), pairs(48), pairs(20, seed=1)
    )
    single.train()
    single.save_model()
    alone = ClassifierReward(str(tmp_path / "one"), device="cpu").score(BATCH).scores
    torch.testing.assert_close(alone, output.extras["member/1"], rtol=0, atol=1e-5)
    # a finished member is kept, an unfinished one is trained
    before = (folder / "member_0" / "model.safetensors").stat().st_mtime_ns
    (folder / "member_1" / "reward_normalizer.json").unlink()
    train_reward_ensemble(trunk, args, pairs(48), pairs(20, seed=1), members=2, resume=True)
    assert (folder / "member_0" / "model.safetensors").stat().st_mtime_ns == before
    assert Normalizer.load(folder / "member_1") is not None


def test_weights_are_on_the_disk_before_a_member_counts_as_whole(trunk, tmp_path, unflushed):
    """Else a power loss could leave the mark of a whole member without its weights."""
    train_reward_ensemble(trunk, config(tmp_path, max_steps=1), pairs(48), pairs(20, seed=1), members=1)
    assert unflushed["reward_normalizer.json"] == []


@pytest.mark.parametrize("kind", ["lora", "shared_trunk"])
def test_a_joint_ensemble_counts_as_whole_once_it_is_on_the_disk(kind, trunk, tmp_path, unflushed):
    """And one that was there before does not while this one trains: `resume` would have kept it."""

    class Looks(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((tmp_path / "ensemble.json").exists())

    seen = []
    (tmp_path / "ensemble.json").write_text("{}")
    own = {"peft_config": LORA} if kind == "lora" else {"upper_layers": 1}
    args = config(tmp_path, max_steps=1)
    train_reward_ensemble(trunk, args, pairs(16), members=2, kind=kind, callbacks=[Looks()], **own)
    assert unflushed["ensemble.json"] == [] and seen == [False]


def test_a_member_of_an_earlier_ensemble_is_not_this_ones(trunk, tmp_path):
    """Members that are jobs of their own: one whose training broke off is missing, whatever was there before."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("broke off")

    args = config(tmp_path / "runs", num_train_epochs=1)
    train_reward_ensemble(trunk, args, pairs(16), members=2)
    before = (tmp_path / "runs" / "ensemble.json").read_text()
    with pytest.raises(RuntimeError, match="broke off"):
        train_reward_ensemble(trunk, args, pairs(16, seed=2), members=2, member=0, callbacks=[Stop()])
    train_reward_ensemble(trunk, args, pairs(16, seed=2), members=2, member=1)
    assert (tmp_path / "runs" / "ensemble.json").read_text() == before  # not whole, so nothing says that it is
    with pytest.raises(RewardError, match="member_1"):
        load_ensemble(tmp_path / "runs", "mean")
    train_reward_ensemble(trunk, args, pairs(16, seed=2), members=2, member=0)
    load_ensemble(tmp_path / "runs", "mean", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "at least one member"),
        ({"kind": "bagged"}, "one of separate, lora, shared_trunk, got 'bagged'"),
        ({"kind": "shared_trunk"}, "needs upper_layers"),
        ({"member": 5}, "no member 5 among 5, which are numbered from 0"),
        ({"kind": "lora", "peft_config": LORA, "member": 0}, "member 0 cannot be alone"),
        ({"upper_layers": 1}, "upper_layers belongs to the kind shared_trunk; separate would ignore it"),
        ({"kind": "lora", "peft_config": LORA, "train_trunk": True}, "lora would ignore it"),
        ({"kind": "lora"}, "needs a peft_config"),
        (
            {"kind": "lora", "peft_config": LORA, "quantization_config": {}},
            "members of kind lora share a model that is",
        ),
        ({"kind": "shared_trunk", "upper_layers": 1, "peft_config": LORA}, "has no adapters"),
        ({"kind": "shared_trunk", "upper_layers": 2}, "each member can have 1 to 1 upper layers of its own, got 2"),
    ],
)
def test_refused(options, message, trunk, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_reward_ensemble(trunk, config(tmp_path), pairs(8), **options)


def test_members_that_share_a_model_are_padded(trunk, tmp_path):
    args = config(tmp_path, batching="shared_prefix")
    with pytest.raises(ConfigError, match="batches of members that share a model are padded"):
        JointRewardTrainer(joint_model(trunk, "lora", [1, 2]), args, pairs(8))


def test_every_member_has_its_copy(trunk):
    model = joint_model(trunk, "shared_trunk", [1, 2])
    assert sorted(name for name, m in model.named_modules() if isinstance(m, Members)) == [
        "model.layers.1",
        "model.norm",
        "score",
    ]


if __name__ == "__main__":
    on_one_rank(*sys.argv[1:])
