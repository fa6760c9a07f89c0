"""A word tokenizer with a chat template, and tiny reward models in folders."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.modeling import tiny

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}U: {{ m['content'] }} {% else %}A: {{ m['content'] }} </s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
WORDS = [f"w{i}" for i in range(30)]


def tokenizer(encoder: bool = False, pad: str | None = "<pad>", template: str | None = TEMPLATE):
    """30 words; decoders have EOS only, encoders CLS and SEP only."""
    names = ["<pad>", "[SEP]" if encoder else "</s>", "[CLS]", "U:", "A:", "<unk>", *WORDS]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": pad, "unk_token": "<unk>"}
    if encoder:
        backend.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 1)]
        )
        special.update(cls_token="[CLS]", sep_token="[SEP]")
    else:
        special["eos_token"] = "</s>"
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.chat_template = template
    return made


def reward_folder(path, kind="llama", seed=0, scale=1.0, offset=0.0, dtype=torch.float32, **tokenizer_options):
    """A saved reward model with its tokenizer; its scores are scaled and shifted."""
    model = tiny.classifier(kind, seed=seed, dtype=dtype)
    head = model.score if kind == "llama" else model.classifier
    with torch.no_grad():
        head.weight *= scale
        if kind == "bert":
            head.bias += offset
    model.save_pretrained(path)
    tokenizer(encoder=kind == "bert", **tokenizer_options).save_pretrained(path)
    return str(path)
