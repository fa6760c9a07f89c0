"""Answers in which tools speak: what they said is read and not trained, in both layouts and with cached log-probs."""

import pytest
import torch
from datasets import Dataset

from align.data import toy
from align.errors import DataError
from align.modeling.logprobs import token_logps
from align.trainers.dpo import DPOTrainer
from tests.trainers.pairs.preference_runs import dpo_config
from tests.trainers.tiny_runs import logged, tiny_model

PAIRS = [  # the second pair begins alike, with what a tool said in the part that both share
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, 10, 2], "rejected_ids": [11, 12, 2],
     "chosen_mask": [1, 0, 0, 1, 1], "rejected_mask": [1, 1, 1]},
    {"prompt_ids": [6, 7, 8], "chosen_ids": [9, 10, 11, 5, 2], "rejected_ids": [9, 10, 11, 12, 13, 2],
     "chosen_mask": [1, 0, 1, 1, 1], "rejected_mask": [1, 0, 1, 0, 1, 1]},
]  # fmt: skip


def run(tmp_path, rows=PAIRS, **options):
    tokenizer = toy.tokenizer()
    args = dpo_config(tmp_path, max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2, **options)
    trainer = DPOTrainer(tiny_model(tokenizer), args, Dataset.from_list(rows), processing_class=tokenizer)
    start = trainer.evaluate(Dataset.from_list(rows))
    trainer.train()
    return trainer, start, torch.tensor([logged(trainer, "loss"), logged(trainer, "grad_norm")])


def test_layouts_and_the_cache_agree_on_what_is_trained(tmp_path):
    model = tiny_model(toy.tokenizer()).eval()
    expected = {"chosen": [], "rejected": []}
    for name, sums in expected.items():
        for row in PAIRS:
            ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
            logps = token_logps(model, ids, torch.ones_like(ids))[0, -len(row[f"{name}_ids"]) :]
            sums.append((logps * torch.tensor(row[f"{name}_mask"])).sum())
    _, start, padded = run(tmp_path / "padded", batching="padded")
    for name, sums in expected.items():
        assert start[f"eval_logps/{name}"] == pytest.approx(torch.stack(sums).mean().item(), abs=1e-5)
    for options in ({"batching": "shared_prefix"}, {"batching": "padded", "precompute_ref_log_probs": True}):
        torch.testing.assert_close(run(tmp_path / str(options), **options)[2], padded, atol=1e-5, rtol=1e-4)
    unmasked = [{name: value for name, value in row.items() if "mask" not in name} for row in PAIRS]
    assert (run(tmp_path / "all", unmasked, batching="padded")[2] - padded).abs().max() > 1e-3


def test_masks_are_cut_with_their_answers_and_checked(tmp_path):
    trainer, *_ = run(tmp_path / "cut", max_length=7)
    assert trainer.train_dataset[1]["chosen_mask"] == [1, 0, 1, 1] and len(trainer.train_dataset[1]["chosen_ids"]) == 4
    for change, message in (
        ({"chosen_mask": [1, 1]}, "chosen_mask must have a 0 or 1 for each of chosen_ids, and a 1: rows .1."),
        ({"chosen_mask": [0] * 5}, "and a 1: rows .1."),
    ):
        with pytest.raises(DataError, match=message):
            run(tmp_path / "bad", [PAIRS[0], PAIRS[1] | change])
