"""Tokenizers made on the spot: byte-level BPE with a few merges, so that any text survives the way there and back."""

import os
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

datasets.disable_progress_bars()

CORPUS = [
    "Human: What colour is the sky?\n\nAssistant: The sky is blue, yes it is.",
    "Question: Is it yes or no?\nAnswer: yes\n\nyes yes no no blue green sky sun",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _train(pre_tokenizer, decoder, alphabet, special) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Files read by a test leave nothing in the user's cache of datasets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def make_tokenizer():
    """make_tokenizer(bos=..., template=..., pad_is_eos=..., eos=..., style="bytes" | "metaspace")."""

    def make(bos=False, template=None, pad_is_eos=False, eos="<eos>", style="bytes", adds_eos=False):
        special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
        if style == "bytes":
            parts = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            raw = _train(*parts, pre_tokenizers.ByteLevel.alphabet(), special)
        else:
            raw = _train(pre_tokenizers.Metaspace(), decoders.Metaspace(), [chr(c) for c in range(33, 127)], special)
        if bos or adds_eos:
            single = f"{'<bos> ' if bos else ''}$A{' <eos>' if adds_eos else ''}"
            ids = [(token, raw.token_to_id(token)) for token in ("<bos>", "<eos>")]
            raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
        return PreTrainedTokenizerFast(
            tokenizer_object=raw,
            bos_token="<bos>" if bos else None,
            eos_token=eos,
            pad_token=eos if pad_is_eos else "<pad>",
            chat_template=template,
            additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        )

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(bos=True)


@pytest.fixture
def chat_tokenizer(make_tokenizer):
    return make_tokenizer(template=CHATML, eos="<|im_end|>")


@pytest.fixture
def marked_tokenizer(make_tokenizer):
    return make_tokenizer(template=CHATML_MARKED, eos="<|im_end|>")


@pytest.fixture
def shared_file():
    """shared_file(name) -> path of a real data file; skips the test where a clone does not have it."""
    root = Path(__file__).parents[2]
    folder = (root / os.environ.get("ALIGN_SHARED_DATA", "../shared/data")).resolve()

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"{folder / name} is missing (set ALIGN_SHARED_DATA to the folder that holds {name})")
        return folder / name

    return find
