"""Completions that are drawn for best-of-n are shown to rewards as in training."""

import json
import logging

import pandas as pd
import pytest
import torch

from align.data import toy
from align.errors import DataError
from align.evaluation.scoring import sample_table, score_table
from align.reward_models.base import Reward, RewardBatch, RewardOutput
from align.reward_models.build import build_reward
from align.reward_models.ensemble import RewardEnsemble
from tests.reward_models import worlds
from tests.trainers.tiny_runs import tiny_model


class Watch(Reward):
    name = "watch"

    def __init__(self):
        self.seen: list[RewardBatch] = []

    def _score(self, batch):
        self.seen.append(batch)
        return RewardOutput(torch.zeros(len(batch)))


def test_rewards_see_tags_and_which_answers_were_cut(tmp_path):
    tokenizer = toy.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})
    model = tiny_model(tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is equally likely
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    (tmp_path / "prompts.jsonl").write_text(json.dumps(toy.split_prompts(0, 4)[0][0]))
    drawn, read = Watch(), Watch()
    table = sample_table(
        str(tmp_path / "policy"), str(tmp_path / "prompts.jsonl"), lambda tokenizer: {"watch": drawn},
        tmp_path / "drawn.parquet", n=64, num_prompts=1, max_completion_length=24, backend="transformers",
    )  # fmt: skip
    (batch,), tag = drawn.seen, tokenizer.convert_tokens_to_ids("<answer>")
    tagged = [tag in ids for ids in batch.completion_ids]
    assert tagged == ["<answer>" in text for text in batch.completions] and any(tagged)
    ends = [ids[-1] == tokenizer.eos_token_id for ids in batch.completion_ids]
    assert batch.ended == ends and 0 < sum(ends) < len(ends)
    assert not any(tokenizer.eos_token in text for text in batch.completions)
    # scored again from the table, what was cut is still known to be cut
    pd.read_parquet(table).drop(columns="watch").to_parquet(tmp_path / "again.parquet")
    columns = {"prompt": "prompt", "completion": "completion"}
    score_table(tmp_path / "again.parquet", {"watch": read}, tmp_path / "scored.parquet", **columns)
    assert read.seen[0].ended == ends and read.seen[0].completions == batch.completions


def test_a_model_that_reads_messages_gets_them_with_chat_and_warns_without(tmp_path, caplog):
    folder = worlds.reward_folder(tmp_path / "rm")
    assert worlds.tokenizer().chat_template
    model = build_reward({"type": "classifier", "path": str(folder), "normalize": False})
    both = {"rm": model, "of": RewardEnsemble([model, model], "mean", name="of", normalize=False), "watch": Watch()}
    rows = pd.DataFrame({"prompt": ["w1 w2 ", "w3 "], "completion": ["w4", "w5 w6"]})
    rows.to_parquet(tmp_path / "table.parquet")
    talks = RewardBatch(
        [[{"role": "user", "content": text}] for text in rows["prompt"]],
        [[{"role": "assistant", "content": text}] for text in rows["completion"]],
    )
    texts = RewardBatch(rows["prompt"].tolist(), rows["completion"].tolist())
    columns = {"prompt": "prompt", "completion": "completion"}
    logging.getLogger("align").propagate = True
    for chat, expected, warned in ((True, talks, []), (False, texts, ["rm", "of"])):
        caplog.clear()
        path = score_table(tmp_path / "table.parquet", both, tmp_path / f"{chat}.parquet", **columns, chat=chat)
        scored, scores = pd.read_parquet(path), model.score(expected).scores.numpy()
        assert scored["rm"].tolist() == scored["of"].tolist() == scores.tolist()
        assert scored["completion"].tolist() == rows["completion"].tolist()
        said = [record.message for record in caplog.records if "say --chat" in record.message]
        assert len(said) == len(warned) and all(f" {name} is" in text for name, text in zip(warned, said, strict=True))
    assert (model.score(talks).scores - model.score(texts).scores).abs().min() > 1e-3


def test_rewards_read_the_prompts_and_not_their_numbers(tmp_path):
    """`--prompt_column` says which rows share a prompt; where the table has texts too, these are scored."""
    watch, path = Watch(), tmp_path / "table.csv"
    path.write_text("id,prompt,completion,gold\n1,2 + 2,4,1\n1,2 + 2,007,0\n")
    score_table(path, {"watch": watch}, tmp_path / "scored.parquet", prompt="id", completion="completion")
    assert watch.seen[0].prompts == ["2 + 2", "2 + 2"] and watch.seen[0].columns["id"] == [1, 1]
    assert watch.seen[0].completions == ["4", "007"]  # numbers are texts here
    model = build_reward({"type": "classifier", "path": str(worlds.reward_folder(tmp_path / "rm")), "normalize": False})
    path.write_text("id,completion,gold\n1,w4,1\n1,w5,0\n")
    options = {"prompt": "id", "completion": "completion"}
    score_table(path, {"watch": watch}, tmp_path / "scored.parquet", **options)  # a function may do without prompts
    with pytest.raises(DataError, match=r"column 'id' holds numbers \(int64\), and rewards read the prompt as a text"):
        score_table(path, {"rm": model}, tmp_path / "scored.parquet", **options)
    pd.DataFrame({"prompt": ["w1", "w2"], "completion": [1, 2]}).to_parquet(tmp_path / "t.parquet")
    options = {"prompt": None, "completion": "completion"}
    with pytest.raises(DataError, match="column 'completion' holds numbers"):
        score_table(tmp_path / "t.parquet", {"watch": watch}, tmp_path / "scored.parquet", **options)
    pd.DataFrame({"prompt": ["w1", "w2"], "completion": ["x", None]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'completion' is missing in rows 1"):
        score_table(tmp_path / "t.parquet", {"watch": watch}, tmp_path / "scored.parquet", **options)
