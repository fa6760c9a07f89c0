"""Soft labels, and what the reward trainer says about its scores."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from align.errors import ConfigError, DataError
from align.modeling.padding import with_own_padding
from align.reward_models.base import RewardBatch
from align.reward_models.classifier import ClassifierReward
from align.trainers.pairs.evaluation import CHOSEN, REJECTED
from align.trainers.reward import RewardTrainer, agreement, pair_data, reliability_figure
from tests.reward_models import worlds
from tests.trainers.test_reward import config, encoder, logged, pairs, trunk  # noqa: F401


def test_soft_labels_are_learned(trunk, tmp_path):  # noqa: F811
    """Two answers, again and again, of which the first is preferred three times in four: the score says so."""
    row = {"prompt": "w7 ", "chosen": "w1 w2", "rejected": "w9", "chosen_prob": 0.75}
    rows = Dataset.from_list([row] * 16)
    args = config(tmp_path, num_train_epochs=40, learning_rate=3e-3, eval_strategy="epoch", logging_steps=40)
    trainer = RewardTrainer(trunk, args, rows, rows)
    trainer.train()
    margin = logged(trainer, "eval_rewards/margins")[-1]
    assert 1 / (1 + np.exp(-margin)) == pytest.approx(0.75, abs=0.01)
    entropy = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    assert logged(trainer, "eval_loss")[-1] == pytest.approx(entropy, abs=1e-3)
    assert logged(trainer, "eval_rewards/accuracies")[-1] == pytest.approx(0.75)
    assert logged(trainer, "eval_calibration_error")[-1] == pytest.approx(0, abs=0.01)


def test_a_label_of_zero_is_the_pair_turned_round(trunk, tmp_path):  # noqa: F811
    data = pairs(16)
    turned = data.rename_columns({"chosen": "rejected", "rejected": "chosen"}).add_column("chosen_prob", [0.0] * 16)
    losses = []
    for rows in (data, turned):
        trainer = RewardTrainer(trunk, config(tmp_path, max_steps=1, logging_steps=1), rows, rows)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_tie_is_no_agreement_whatever_the_label():
    margins = torch.tensor([0.5, 0.0, -0.5])
    assert agreement(margins, {})["rewards/accuracies"].tolist() == [1, 0, 0]
    soft = agreement(margins, {"chosen_prob": torch.tensor([0.25, 0.25, 0.25])})
    assert soft["rewards/accuracies"].tolist() == [0.25, 0, 0.75]


def test_the_normaliser_is_fitted_on_evaluation_sets_with_other_columns(trunk, tmp_path):  # noqa: F811
    """Soft labels in one of them. The run ended in a TypeError once it was trained."""
    soft, hard = pairs(5, seed=1, chosen_prob=0.7), pairs(3, seed=2)
    trainer = RewardTrainer(trunk, config(tmp_path, max_steps=1), pairs(16), {"soft": soft, "hard": hard})
    trainer.train()
    both = concatenate_datasets([soft.remove_columns("chosen_prob"), hard])
    assert trainer.normalizer.fitted_on == "both answers of 8 evaluation pairs"
    trainer.predict(both)
    scores = np.concatenate([trainer.evaluator.values[side] for side in (CHOSEN, REJECTED)])
    assert trainer.normalizer.mean == pytest.approx(scores.mean(), abs=1e-6)


def test_metrics_of_the_scores(trunk, tmp_path):  # noqa: F811
    data = pairs(40, seed=1)
    trainer = RewardTrainer(trunk, config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2), pairs(16), data)
    trainer.train()
    model = ClassifierReward(trainer.model, tokenizer=trainer.processing_class, device="cpu")
    chosen = model.score(RewardBatch(data["prompt"][:], data["chosen"][:])).scores.double().numpy()
    rejected = model.score(RewardBatch(data["prompt"][:], data["rejected"][:])).scores.double().numpy()
    scores, margins = np.concatenate([chosen, rejected]), chosen - rejected
    for name in ("mean", "std", "min", "max"):
        assert logged(trainer, f"eval_rewards/{name}")[-1] == pytest.approx(getattr(scores, name)(), abs=1e-4)
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    place = np.minimum(((sure - 0.5) * 20).astype(int), 9)
    error = sum(
        abs(sure[place == b].mean() - (margins[place == b] > 0).mean()) * (place == b).mean()
        for b in range(10)
        if (place == b).any()
    )
    assert logged(trainer, "eval_calibration_error")[-1] == pytest.approx(error, abs=1e-3)
    curve = trainer.reliability()
    figure = reliability_figure(curve, "step 2")
    line = figure.axes[0].lines[1]
    assert line.get_ydata().tolist() == curve.accuracy[curve.count > 0].tolist() and len(figure.axes) == 2
    assert json.dumps(trainer.state.log_history)


def test_labels_that_are_none(trunk, tmp_path):  # noqa: F811
    rows = pairs(4).add_column("chosen_prob", [0.5, 1.0, 1.5, 0.0])
    with pytest.raises(DataError, match="chosen_prob is not a probability in \\[0, 1\\].*rows? 2"):
        RewardTrainer(trunk, config(tmp_path), rows)
    good = RewardTrainer(trunk, config(tmp_path, max_bad_share=0.3), rows).train_dataset
    assert good["chosen_prob"][:] == [0.5, 1.0, 0.0] and good["row"][:] == [0, 1, 3]
    again = good.remove_columns("chosen_prob").add_column("chosen_prob", [0.5, float("nan"), 0.0])
    with pytest.raises(DataError, match="tokenised pairs, row 1: chosen_prob is not a finite number"):
        RewardTrainer(trunk, config(tmp_path), again)
    with pytest.raises(ConfigError, match="label_smoothing_factor is for token labels: give the pairs .* chosen_prob"):
        config(tmp_path, label_smoothing_factor=0.1)
    for order in ("group_by_length", "batch_rebalance"):
        with pytest.raises(ConfigError, match=f"train_sampling_strategy: {order} sorts rows of one sequence"):
            config(tmp_path, train_sampling_strategy=order)
    with pytest.raises(ConfigError, match="length_column_name: no trainer here sorts rows by length"):
        config(tmp_path, length_column_name="tokens")


def test_pairs_that_the_model_cannot_take(encoder, tmp_path):  # noqa: F811
    rows = pairs(3).add_column("margin", [0.0] * 3)
    long = Dataset.from_list([*rows, {**rows[0], "chosen": "w1 " * 80}])
    with pytest.raises(DataError, match="1 rows of the training data are longer than the 64 tokens .* max_length: 64"):
        RewardTrainer(encoder, config(tmp_path), long)
    RewardTrainer(encoder, config(tmp_path, max_length=64), long)


# ---- padding


def test_padding_is_not_the_end_token(trunk, tmp_path, caplog):  # noqa: F811
    tokenizer = worlds.tokenizer()
    assert with_own_padding(tokenizer) is tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    assert with_own_padding(tokenizer).pad_token == "<pad>" and tokenizer.pad_token == "</s>"  # a copy
    bare = worlds.tokenizer(pad=None)
    bare.bos_token = "[CLS]"
    assert with_own_padding(bare).pad_token in ("[CLS]", "<pad>")
    caplog.clear()
    none = worlds.tokenizer(pad=None)
    assert with_own_padding(none) is none and "one sequence at a time" in caplog.text


def test_two_members_of_a_batch_weigh_by_their_labels(trunk, tmp_path):  # noqa: F811
    """The loss of a step is the mean over pairs, whatever the micro-batches."""
    rows = pairs(8).add_column("chosen_prob", [0.9, 0.6, 0.5, 1.0, 0.1, 0.8, 0.7, 0.3])
    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        args = config(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
        )
        trainer = RewardTrainer(trunk, args, rows, rows)
        trainer.train()
        losses.append([logged(trainer, key)[0] for key in ("loss", "grad_norm", "rewards/accuracies")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_margins_of_scores(trunk, tmp_path):  # noqa: F811
    """The loss is that of a column `margin` with these numbers; completions with scores have them too."""
    data = pairs(16)
    scores = {"chosen_score": [4.0 + i % 3 for i in range(16)], "rejected_score": [float(i % 2) for i in range(16)]}
    margin = [0.25 * (a - b) for a, b in zip(*scores.values(), strict=True)]
    rows = data.to_list()
    scored = [{**row, **{name: values[i] for name, values in scores.items()}} for i, row in enumerate(rows)]
    several = [
        {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "scores": [b, a]}
        for row, a, b in zip(rows, *scores.values(), strict=True)
    ]
    losses = []
    for given, scale in ((data.add_column("margin", margin), None), (Dataset.from_list(scored), 0.25),
                         (Dataset.from_list(several), 0.25), (data, None)):  # fmt: skip
        trainer = RewardTrainer(trunk, config(tmp_path, max_steps=1, logging_steps=1, score_margin=scale), given)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[0] == losses[1] == losses[2] and losses[3] < losses[0] - 0.1
    again = pair_data(trainer.processing_class, config(tmp_path, score_margin=0.25))
    first = again.prepare(Dataset.from_list(scored), "train")
    assert again.prepare(first, "train")["margin"][:] == margin  # an ensemble's members get prepared rows
    with pytest.raises(ConfigError, match="score_margin must be above 0"):
        config(tmp_path, score_margin=-1.0)
    for bad, said in (
        (data, "there is no chosen_score and no rejected_score"),
        (Dataset.from_list([{**scored[0], "chosen_score": -1.0}, *scored[1:]]), "rejected_score above.*rows .0."),
        (Dataset.from_list(scored).add_column("margin", [1.0] * 16), "makes another one"),
    ):
        with pytest.raises(DataError, match=said):
            again.prepare(bad, "train")
