"""4-bit base weights with a LoRA adapter, through the command line; and the guard against weights without gradient."""

import pytest
import torch
from safetensors.torch import load_file

from align.cli.main import main
from align.data.tokenize import tokenize_pairs
from align.errors import TrainingError
from align.reward_models.base import RewardBatch
from align.reward_models.ensemble import load_ensemble
from align.trainers.dpo import DPOTrainer
from align.trainers.reward import RewardTrainer
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import logged, parameters

OPTIONS = (
    "--use_peft --load_in_4bit --lora_r 4 --max_length 32 --max_steps 3 --use_cpu --report_to none --logging_steps 1 "
    "--learning_rate 1e-2 --eval_strategy steps --eval_steps 1 --eval_on_start --per_device_train_batch_size 4"
).split()


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "test"):
        toy_pairs(20).to_json(folder / f"{split}.jsonl")
    return str(folder)


@pytest.mark.parametrize("method", ["dpo", "dpo --loss_type tdpo2", "sparsepo", "sparsepo --variant mapo", "reward"])
def test_an_adapter_on_4_bit_weights_is_trained(method, policy, pairs_folder, tmp_path):
    """Evaluations come first: they must leave the quantised layers as they are."""
    files = ["--model_name_or_path", policy, "--dataset_name", pairs_folder]
    assert main([*method.split(), *files, *OPTIONS, "--output_dir", str(tmp_path / "run")]) == 0
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    trained = {name: bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name}  # they start at 0
    assert trained and all(trained.values())
    assert all(tensor.is_floating_point() for tensor in adapter.values())


def test_members_of_an_ensemble_are_adapters_on_4_bit_weights(policy, pairs_folder, tmp_path, monkeypatch):
    packed, train = [], RewardTrainer.train

    def counted(trainer, *args, **kwargs):
        packed.append(sum(type(module).__name__ == "Linear4bit" for module in trainer.model.modules()))
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(RewardTrainer, "train", counted)
    files = ["--model_name_or_path", policy, "--dataset_name", pairs_folder, "--output_dir", str(tmp_path)]
    assert main(["reward", *files, *OPTIONS, "--ensemble", "2"]) == 0
    assert len(packed) == 2 and min(packed) > 0
    for member in ("member_0", "member_1"):
        adapter = load_file(tmp_path / member / "adapter_model.safetensors")
        assert all(value.any() for name, value in adapter.items() if "lora_B" in name)
    scores = load_ensemble(tmp_path, "mean", device="cpu").score(RewardBatch(["w1 "], ["w3 w4"])).scores
    assert torch.isfinite(scores).all()


def test_weights_that_no_gradient_reaches_are_an_error(policy, tokenizer, tmp_path):
    trainer = DPOTrainer(policy, dpo_config(tmp_path), tokenize_pairs(toy_pairs(20), tokenizer, max_length=32))
    before = {name: value.clone() for name, value in parameters(trainer.model).items()}
    trainer.model.lm_head.requires_grad_(False)
    trainer.model.model.norm.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    with pytest.raises(TrainingError, match="got no gradient .*nothing would be trained"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainer.model).items())


def test_some_weights_without_gradient_are_a_warning(policy, tokenizer, tmp_path, caplog):
    trainer = DPOTrainer(policy, dpo_config(tmp_path), tokenize_pairs(toy_pairs(20), tokenizer, max_length=32))
    trainer.model.register_parameter("unused", torch.nn.Parameter(torch.zeros(2)))
    trainer.train()
    assert "got no gradient (unused" in caplog.text and logged(trainer, "loss")
