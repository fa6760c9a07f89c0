"""Trainers without `args`: the method's defaults."""

import pytest
import torch
from datasets import Dataset

import align
from align.errors import ConfigError
from align.lazy import load
from align.methods import METHODS
from align.modeling.load import load_policy, load_tokenizer
from tests.trainers.tiny_runs import demonstrations, discriminator, prompts, tiny_model, wanted_words

PAIRS = [{"prompt": prompt, "chosen": " wave chord", "rejected": " ridge"} for prompt in ("rose", "comet")]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """The folder of a tiny policy with positions for the default lengths."""
    from align.data import toy

    folder, tokenizer = tmp_path_factory.mktemp("defaults") / "tiny", toy.tokenizer()
    tiny_model(tokenizer, max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make(method, model, args=None, **options):
    """A trainer with its rows and rewards, and nothing else."""
    pairs = Dataset.from_list(PAIRS)
    rows = {
        "completions": demonstrations(2),
        "pairs": pairs,
        "unpaired": pairs,
        "ranked": pairs,
        "prompts": prompts(8),
    }["pairs" if method.offline_pairs else method.data]
    reward = [wanted_words] if method.rewards else []
    if method.name == "d2po":
        reward, options["gold_reward"] = [discriminator(load_tokenizer(model))], wanted_words
    return load(method.trainer)(model, *reward, args, rows, **options)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_trainer_has_default_options_and_needs_rows(method, roomy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, cls = make(method, roomy), load(method.trainer)
    name = cls.__name__.removesuffix("Trainer")
    assert type(trainer.args) is load(method.config) and trainer.args.output_dir == f"tiny-{name}"
    with pytest.raises(ConfigError, match=f"{name}Trainer: `train_dataset` is required"):
        cls(roomy, *([wanted_words] if method.rewards else []))


def test_training_without_options_moves_the_weights(roomy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sft", "dpo", "reinforce_pp"):
        options, model = {}, load_policy(roomy)
        if name == "reinforce_pp":  # the engine that "auto" chooses depends on the machine
            tokenizer = load_tokenizer(roomy)
            options["engine"] = align.make_engine(model, tokenizer, backend="transformers", max_model_len=768)
        start = {key: value.clone() for key, value in model.state_dict().items()}
        trainer = make(METHODS[name], model, **options)
        trainer.train()
        assert trainer.state.global_step == 3  # epochs, of one batch
        assert any(not torch.equal(start[key], value) for key, value in trainer.model.state_dict().items()), name
