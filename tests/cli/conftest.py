"""A tiny local model and small files of rows, made on the spot: nothing here needs the network."""

import json
from pathlib import Path

import pytest

QUESTIONS = [f"What is {i} plus {i}?" for i in range(12)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a two-layer causal language model and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    folder = tmp_path_factory.mktemp("tiny_model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=vocab["<eos>"],
        pad_token_id=vocab["<pad>"],
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def demonstrations(tmp_path) -> str:
    rows = [{"prompt": q, "completion": f" It is {2 * i}."} for i, q in enumerate(QUESTIONS)]
    return _write(tmp_path / "demonstrations.jsonl", rows)


@pytest.fixture
def pairs(tmp_path) -> str:
    rows = [
        {"prompt": q, "chosen": f" It is {2 * i}.", "rejected": f" It is {3 * i + 1}."} for i, q in enumerate(QUESTIONS)
    ]
    return _write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def prompts(tmp_path) -> str:
    return _write(tmp_path / "prompts.jsonl", [{"prompt": q} for q in QUESTIONS])


@pytest.fixture
def rule(tmp_path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text("def short(completions, **columns):\n    return [-float(len(text)) for text in completions]\n")
    return f"{path}:short"
