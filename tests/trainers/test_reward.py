import json
import os
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Mistral3Config

from align.data.collate import PairCollator
from align.data.noise import flip_labels, save_flips
from align.data.shared_prefix import SharedPrefixCollator
from align.errors import ConfigError, DataError
from align.modeling.load import load_sequence_classifier
from align.modeling.pretrained import check_has_classifier
from align.modeling.score_head import head_name
from align.reward_models.base import RewardBatch
from align.reward_models.classifier import ClassifierReward
from align.reward_models.normalizer import Normalizer
from align.trainers.reward import RewardTrainer
from tests.modeling import tiny, wrapped
from tests.reward_models import worlds
from tests.trainers.reward_runs import config, logged, pairs
from tests.trainers.two_processes import run_on_two


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A causal language model without a score head, float32."""
    folder = tmp_path_factory.mktemp("lm")
    tiny.causal(dtype=torch.float32, initializer_range=0.1, hidden_size=32, num_hidden_layers=1).save_pretrained(folder)
    worlds.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny.classifier("bert", dtype=torch.float32, initializer_range=0.1).bert.save_pretrained(folder)
    worlds.tokenizer(encoder=True).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["causal", "encoder", "causal LoRA"])
def test_trains_saves_and_scores_alike(kind, trunk, encoder, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if "LoRA" in kind else None
    trainer = RewardTrainer(
        encoder if kind == "encoder" else trunk,
        config(tmp_path, eval_strategy="epoch", num_train_epochs=6),
        pairs(160),
        pairs(60, seed=1),
        peft_config=lora,
    )
    trainer.train()
    trainer.save_model()
    assert logged(trainer, "eval_rewards/accuracies")[-1] > 0.7
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0] / 2 and len(logged(trainer, "eval_loss")) == 6
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "loss", "time/train"):
        assert logged(trainer, name)
    reward = ClassifierReward(str(tmp_path), device="cpu")
    batch = RewardBatch(["w7 w8 "] * 3, ["w1 w2 w3", "w9", "w20 w21 w22 w23"])
    own = ClassifierReward(
        trainer.model, tokenizer=trainer.processing_class, normalizer=trainer.normalizer, device="cpu"
    )
    torch.testing.assert_close(reward.score(batch).scores, own.score(batch).scores, rtol=0, atol=1e-4)
    assert reward.score(batch).scores.argmax() == 0
    normaliser = Normalizer.load(tmp_path)
    assert normaliser.fitted_on == "both answers of 60 evaluation pairs" and normaliser.count == 120


def test_transformers_loads_what_we_save(trunk, tmp_path):
    from transformers import AutoModelForSequenceClassification

    trainer = RewardTrainer(trunk, config(tmp_path, num_train_epochs=1), pairs(32), pairs(10, seed=1))
    trainer.train()
    trainer.save_model()
    reward = ClassifierReward(str(tmp_path), normalize=False, device="cpu")
    sequences = reward.inputs(RewardBatch(["w1 ", "w2 w3 "], ["w4", "w5 w6 w7"]))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.tensor([sequences[0] + [0] * 3, sequences[1]])
    scores = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]
    torch.testing.assert_close(reward.score_ids(sequences), scores, rtol=0, atol=1e-5)


def first_step(trunk, folder, batch, accumulation, data, **options):
    args = config(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        center_rewards_coefficient=0.01,
        score_l2_coefficient=0.01,
        **options,
    )
    trainer = RewardTrainer(trunk, args, data, data)
    trainer.train()
    return [torch.tensor(logged(trainer, key)[:2]) for key in ("loss", "grad_norm", "rewards/margins")]


def test_the_loss_is_bradley_terrys_with_both_penalties_added(trunk, tmp_path):
    args = config(tmp_path, center_rewards_coefficient=0.3, score_l2_coefficient=0.7)
    trainer = RewardTrainer(trunk, args, pairs(8), pairs(8))
    trainer.model.get_submodule(head_name(trainer.model)).weight.data.mul_(5)  # scores of some size
    loss = trainer.evaluate()["eval_loss"]
    chosen, rejected = (trainer.evaluator.values[f"rewards/{side}"].astype(float) for side in ("chosen", "rejected"))
    ranking, centre, size = np.log1p(np.exp(rejected - chosen)), (chosen + rejected) ** 2, (chosen**2 + rejected**2) / 2
    assert centre.mean() > 0.1 and loss == pytest.approx((ranking + 0.3 * centre + 0.7 * size).mean(), rel=1e-5)


def test_batch_times_accumulation_does_not_matter(trunk, tmp_path):
    data = pairs(16)
    expected = first_step(trunk, tmp_path, 8, 1, data)
    for batch, accumulation in ((4, 2), (1, 8)):
        actual = first_step(trunk, tmp_path, batch, accumulation, data)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_last_step_of_an_epoch_is_a_mean_too(trunk, tmp_path):
    """13 pairs in steps of 8 leave 5: two micro-batches of 4 and 1 weigh as one batch of 5."""
    data = pairs(13)
    losses = [first_step(trunk, tmp_path, b, a, data)[0] for b, a in ((8, 1), (4, 2))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def on_one_rank(trunk, folder):
    """What a process of `test_two_processes_are_one` does, of which this file is the main module."""
    rank = int(os.environ["RANK"])
    values = first_step(trunk, folder, 4, 1, pairs(13), ddp_backend="gloo")
    torch.save((values, wrapped.differences(rank)), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(trunk, tmp_path):
    """Starting processes is slow, so one start serves the trainer and the functions under it."""
    expected = first_step(trunk, tmp_path, 8, 1, pairs(13))
    for values, differences in run_on_two("tests.trainers.test_reward", tmp_path / "two", str(trunk)):
        for actual, whole in zip(values, expected, strict=True):
            torch.testing.assert_close(actual[0], whole[0], rtol=1e-5, atol=1e-6)
        assert len(differences) == 8 and max(differences.values()) < 1e-9, differences


def test_answers_that_share_their_prompt_train_as_padded_ones(trunk, encoder, tmp_path):
    runs = {}
    for batching in ("padded", "shared_prefix", "auto"):
        options = {"batching": batching, "num_train_epochs": 1, "logging_steps": 1, "eval_strategy": "steps"}
        args = config(tmp_path / batching, eval_steps=5, **options)
        trainer = RewardTrainer(trunk, args, pairs(80), pairs(21, seed=1))
        trainer.train()
        runs[batching] = trainer
        assert isinstance(trainer.planner.layout, PairCollator if batching == "padded" else SharedPrefixCollator)
    for key in ("loss", "rewards/margins", "eval_loss", "eval_rewards/accuracies"):
        expected = logged(runs["padded"], key)
        assert len(expected) > 0 and logged(runs["shared_prefix"], key) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert logged(runs["auto"], key) == logged(runs["shared_prefix"], key)
    assert runs["auto"].normalizer.mean == pytest.approx(runs["padded"].normalizer.mean, abs=1e-4)
    assert isinstance(RewardTrainer(encoder, config(tmp_path), pairs(8)).planner.layout, PairCollator)
    with pytest.raises(ConfigError, match="shared_prefix cannot be used with this model: its scores of a pair"):
        RewardTrainer(encoder, config(tmp_path, batching="shared_prefix"), pairs(8))
    with pytest.raises(ConfigError, match="batching cannot be 'packed'; valid: auto, shared_prefix, padded"):
        config(tmp_path, batching="packed")


def test_raw_rows_are_evaluated_and_predicted(trunk, tmp_path):
    raw = pairs(9, seed=2)
    trainer = RewardTrainer(trunk, config(tmp_path), pairs(8))
    metrics, prediction = trainer.evaluate(raw), trainer.predict(raw)
    assert prediction.metrics["test_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert len(trainer.evaluator.values["rewards/chosen"]) == 9 and "eval_calibration_error" in metrics


def test_margin_and_conversations(trunk, tmp_path):
    data = pairs(32)
    chat = data.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        },
        remove_columns=data.column_names,
        keep_in_memory=True,
    )
    losses = []
    for margin in (0.0, 3.0):
        rows = chat.add_column("margin", [margin] * 32)
        trainer = RewardTrainer(trunk, config(tmp_path, max_steps=1, logging_steps=1), rows, rows)
        trainer.train()
        losses += logged(trainer, "loss")
    assert losses[1] > losses[0] + 1.0


def test_without_an_evaluation_set_the_normaliser_says_so(trunk, tmp_path, caplog):
    trainer = RewardTrainer(trunk, config(tmp_path, num_train_epochs=1, normalizer_pairs=20), pairs(40))
    trainer.train()
    assert trainer.normalizer.fitted_on == "both answers of 20 training pairs"
    assert "no evaluation set" in caplog.text


def test_checkpoints_have_no_normaliser_of_an_earlier_training(trunk, tmp_path):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = RewardTrainer(trunk, config(tmp_path, **options), pairs(32), pairs(10, seed=1))
    for _ in range(2):
        trainer.train()
        assert trainer.normalizer is not None and Normalizer.load(tmp_path / "checkpoint-1") is None


def test_resume_is_exact(trunk, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "per_device_train_batch_size": 8}
    data = pairs(30)
    whole = RewardTrainer(trunk, config(tmp_path / "a", **options), data, data)
    whole.train()
    resumed = RewardTrainer(trunk, config(tmp_path / "a", **options), data, data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.normalizer == resumed.normalizer


def test_wandb_offline(trunk, wandb_offline):
    tmp_path = wandb_offline
    args = config(tmp_path / "run", num_train_epochs=1, report_to="wandb", eval_strategy="epoch")
    trainer = RewardTrainer(trunk, args, pairs(32), pairs(10, seed=1))
    trainer.train()
    import wandb

    wandb.finish()
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    (table,) = media.glob("table/**/*.json")
    content = json.loads(table.read_text())
    assert content["columns"][1:4] == ["prompt", "chosen", "rejected"] and len(content["data"]) == 8
    assert content["data"][0][2].endswith("</s>")
    assert list(media.glob("images/**/*.png"))


def test_label_noise(tmp_path):
    data = pairs(40)
    noisy, rows = flip_labels(data, 0.25, seed=3)
    assert len(rows) == 10 and rows == sorted(set(rows)) and rows == flip_labels(data, 0.25, seed=3)[1]
    assert rows != flip_labels(data, 0.25, seed=4)[1]
    for i in range(40):
        assert (noisy[i]["chosen"] == data[i]["rejected"]) == (i in rows)
        assert noisy[i]["prompt"] == data[i]["prompt"]
    save_flips(tmp_path / "flips.json", rows, share=0.25, seed=3)
    assert json.loads((tmp_path / "flips.json").read_text())["rows"] == rows
    with pytest.raises(DataError, match="in \\[0, 1\\]"):
        flip_labels(data, 1.5, seed=0)
    with pytest.raises(DataError, match="no preference pairs to flip"):
        flip_labels(data.select_columns(["prompt"]), 0.1, seed=0)


def test_errors(trunk, tmp_path):
    with pytest.raises(ConfigError, match="score_l2_coefficient must be at least 0"):
        config(tmp_path, score_l2_coefficient=-1.0)
    with pytest.raises(DataError, match="no preference pairs: expected the columns 'chosen' and 'rejected'"):
        RewardTrainer(trunk, config(tmp_path), Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}))
    with pytest.raises(ConfigError, match="no linear layer with one output"):
        RewardTrainer(tiny.causal(), config(tmp_path), pairs(4), processing_class=worlds.tokenizer())


def test_a_type_without_such_a_class_is_refused_before_its_weights_are_read(tmp_path):
    """The folder has none: a model of text and images (Mistral 3) of which transformers has no classifier."""
    kind = Mistral3Config()
    kind.save_pretrained(tmp_path)
    worlds.tokenizer().save_pretrained(tmp_path)
    says = "no sequence-classification class for mistral3 models.*start from one of another family"
    with pytest.raises(ConfigError, match=says):
        RewardTrainer(str(tmp_path), config(tmp_path / "out"), pairs(8))
    with pytest.raises(ConfigError, match=says):
        load_sequence_classifier(tmp_path)
    kind.auto_map = {"AutoModelForSequenceClassification": "own.Scorer"}
    check_has_classifier(kind)


def test_on_real_pairs(tmp_path, real_pairs):
    from align.data import load_rows

    folder = real_text_model(
        tmp_path / "lm", [row["prompt"] + row["chosen"] for row in load_rows(real_pairs).select(range(200))]
    )
    rows = load_rows(real_pairs)
    args = config(tmp_path / "rm", max_steps=8, per_device_train_batch_size=8, max_length=256, max_bad_share=0.5)
    trainer = RewardTrainer(folder, args, rows.select(range(200)), rows.select(range(200, 240)))
    trainer.train()
    trainer.save_model()
    reward = ClassifierReward(str(tmp_path / "rm"), device="cpu")
    row = rows[0]
    scores = reward.score(RewardBatch([row["prompt"]] * 2, [row["chosen"], row["rejected"]])).scores
    assert torch.isfinite(scores).all() and scores[0] != scores[1]


def real_text_model(folder, texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=800, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    tiny.causal(dtype=torch.float32, vocab_size=800, max_position_embeddings=1024).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    on_one_rank(*sys.argv[1:])
