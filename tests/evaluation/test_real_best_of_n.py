"""Best-of-n on real answers with a gold judge, by a reward model trained on pairs of them: what a user types."""

import os
import random
from pathlib import Path

import pytest

from align.cli.main import main
from align.evaluation.summary import read_summary

ROOT = Path(__file__).parents[2]
TABLE = Path(os.environ.get("ALIGN_SHARED_DATA", ROOT.parent / "shared" / "data")) / "instruction_responses.parquet"
PAIR_PROMPTS, BON_PROMPTS = 300, 40


def tiny_classifier_base(folder: Path, texts: list[str]) -> None:
    """A two-layer causal model with a byte-level BPE tokenizer trained on the answers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.skipif(not TABLE.exists(), reason=f"needs {TABLE} (set ALIGN_SHARED_DATA to its folder)")
def test_reward_model_from_pairs_then_best_of_n(tmp_path, capsys):
    import json

    import pandas as pd

    table = pd.read_parquet(TABLE)
    table = table[(table.completion.str.len().between(1, 1200)) & (table.prompt.str.len() < 600)]
    prompts = sorted(table.prompt.unique())
    random.Random(0).shuffle(prompts)
    rng = random.Random(1)
    rows = []
    for prompt in prompts[:PAIR_PROMPTS]:
        answers = table[table.prompt == prompt]
        first, second = (answers.iloc[i] for i in rng.sample(range(len(answers)), 2))
        if first.gold != second.gold and first.completion != second.completion:
            better, worse = (first, second) if first.gold > second.gold else (second, first)
            rows.append({"prompt": prompt + "\n\n", "chosen": better.completion, "rejected": worse.completion})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_classifier_base(tmp_path / "base", [row["chosen"] for row in rows])

    reward = tmp_path / "reward"
    options = {
        "model_name_or_path": tmp_path / "base",
        "dataset_name": pairs,
        "output_dir": reward,
        "max_length": 400,
        "max_bad_share": 0.1,
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "normalizer_pairs": 32,
        "save_strategy": "no",
        "seed": 0,
    }
    assert main(["reward", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]) == 0

    held_out = table[table.prompt.isin(prompts[-BON_PROMPTS:])]
    held_out = held_out.groupby("prompt").filter(lambda answers: len(answers) >= 16).groupby("prompt").head(16)
    held_out.to_parquet(tmp_path / "answers.parquet")
    assert (
        main(
            ["bon", str(tmp_path / "answers.parquet"), "--rewards", str(reward), "--gold", "gold"]
            + ["--output_dir", str(tmp_path / "bon")]
        )
        == 0
    )
    (curve,) = read_summary(tmp_path / "bon")["best_of_n"].values()
    assert curve["n"] == [1, 2, 4, 8, 16]
    assert curve["gold"][0] == pytest.approx(held_out.groupby("prompt").gold.mean().mean())
    assert all(later > earlier for earlier, later in zip(curve["proxy"], curve["proxy"][1:], strict=False))
    assert (tmp_path / "bon" / "report.html").exists()
    assert "gold" in capsys.readouterr().out
