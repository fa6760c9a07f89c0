"""Local stand-ins for the models and data sets of TRL's tests (the hub's `trl-internal-testing/...`), under the same
names in one folder: a run with that folder as its working directory finds them.

The data are TRL's own, made by the scripts of a clone of its repository; the models have the architectures of TRL's
tiny models with two layers, weights from a fixed seed in bfloat16, a small byte-level tokenizer trained here with the
family's special tokens, and the chat template that the TRL package ships for the family.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
import trl
from datasets import DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

OWNER = "trl-internal-testing"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SHAPE = {
    "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 32,
}  # fmt: skip
HEAD = {"head_dim": 4}
EXPERTS = {**HEAD, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GLM = {**HEAD, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
CONV = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
NEMOTRON = {
    "hidden_size": 16, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 4,
    "mamba_n_groups": 1, "ssm_state_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "use_mamba_kernels": False,
}  # fmt: skip

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
LLAMA = (
    "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>"
)  # fmt: skip
GPT_OSS = (
    "<|startoftext|>", "<|return|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"
)  # fmt: skip
COHERE = (
    "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"
)  # fmt: skip
GEMMA = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>")
LFM = ("<|startoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")

# name: class of the config, its options, chat template, special tokens, and which of them are (bos, eos, pad)
MODELS: dict[str, tuple[str, dict, str | None, tuple[str, ...], tuple[int | None, int, int | None]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2Config", {}, "qwen2_5", QWEN, (None, 2, 0)),
    "tiny-Qwen3ForCausalLM": ("Qwen3Config", HEAD, "qwen3", QWEN, (None, 2, 0)),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeConfig", EXPERTS, "qwen3", QWEN, (None, 2, 0)),
    "tiny-LlamaForCausalLM-3": ("LlamaConfig", {}, "llama3", LLAMA, (0, 1, None)),
    "tiny-LlamaForCausalLM-3.1": ("LlamaConfig", {}, "llama3_1", LLAMA, (0, 1, None)),
    "tiny-LlamaForCausalLM-3.2": ("LlamaConfig", {}, "llama3_2", LLAMA, (0, 1, None)),
    "tiny-MistralForCausalLM-0.1": ("MistralConfig", HEAD, None, ("<s>", "</s>"), (0, 1, None)),
    "tiny-MistralForCausalLM-0.2": ("MistralConfig", HEAD, None, ("<s>", "</s>"), (0, 1, None)),
    "tiny-GPTNeoXForCausalLM": ("GPTNeoXConfig", {}, None, ("<|endoftext|>",), (0, 0, None)),
    "tiny-GptOssForCausalLM": (
        "GptOssConfig", {**HEAD, **MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}, "gptoss", GPT_OSS,
        (0, 1, 2),
    ),
    "tiny-CohereForCausalLM": ("CohereConfig", {}, "cohere", COHERE, (0, 1, 2)),
    "tiny-Cohere2ForCausalLM": ("Cohere2Config", MIXED, "cohere2", COHERE, (0, 1, 2)),
    "tiny-Phi3ForCausalLM": ("Phi3Config", {}, "phi3", ("<s>", "<|endoftext|>", "<|user|>", "<|end|>"), (0, 1, 1)),
    "tiny-GemmaForCausalLM": ("GemmaConfig", HEAD, "gemma", GEMMA, (0, 1, 2)),
    "tiny-Gemma2ForCausalLM": ("Gemma2Config", HEAD, "gemma", GEMMA, (0, 1, 2)),
    "tiny-Olmo3ForCausalLM": ("Olmo3Config", {}, None, ("<|endoftext|>", "<|pad|>"), (None, 0, 1)),
    "tiny-Glm4MoeForCausalLM": ("Glm4MoeConfig", GLM, "glm4moe", ("<|endoftext|>", "<|user|>"), (None, 0, 0)),
    "tiny-DeepseekV3ForCausalLM": ("DeepseekV3Config", {"num_attention_heads": 2}, "deepseekv3", DEEPSEEK, (0, 1, 1)),
    "tiny-DeepseekV3ForCausalLM-0528": (
        "DeepseekV3Config", {"num_attention_heads": 2}, "deepseekv3", DEEPSEEK, (0, 1, 1)
    ),
    "tiny-NemotronHForCausalLM-nano": (
        "NemotronHConfig", NEMOTRON, "nemotron_3_nano", ("<s>", "<|im_end|>", "<unk>", "<|im_start|>"), (0, 1, 2)
    ),
    "tiny-Lfm2ForCausalLM": ("Lfm2Config", CONV, "lfm2", LFM, (0, 1, 2)),
    "tiny-Lfm2ForCausalLM-2.5": ("Lfm2Config", CONV, "lfm2_2_5", LFM, (0, 1, 2)),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2Config", {"hidden_size": 16}, "qwen2_5", QWEN, (None, 2, 0)),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3Config", HEAD, "qwen3", QWEN, (None, 2, 0)),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaConfig", {}, "llama3_2", LLAMA, (0, 1, None)),
}  # fmt: skip


def make_world(clone: Path, folder: Path) -> Path:
    """The stand-ins in `folder` / OWNER, from a clone of TRL's repository; made once. Returns `folder`."""
    owner = folder / OWNER
    done = owner / "done"
    if done.exists():
        return folder
    shutil.rmtree(owner, ignore_errors=True)
    for script in ("zen", "toolcall", "harmony"):
        make_data(clone / "scripts" / f"generate_{script}_dataset.py", owner / script)
    texts = [path.read_text(encoding="utf-8") for path in sorted(owner.rglob("*.jsonl"))]
    for name, (config, options, template, special, ends) in MODELS.items():
        tokenizer = make_tokenizer(texts, template, special, ends)
        make_model(config, options, tokenizer, labels=1 if "SequenceClassification" in name else None).save_pretrained(
            owner / name
        )
        tokenizer.save_pretrained(owner / name)
    make_remote(clone, owner / "tiny-LlamaForCausalLM-3.2", owner / "tiny-RemoteForCausalLM")
    done.touch()
    return folder


def make_data(script: Path, folder: Path) -> None:
    """The data sets that a script of TRL's would push to the hub, each as JSON lines, with a card that names them."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    card = ["---", "configs:"]

    def keep(data: DatasetDict, repo_id: str, config_name: str) -> None:
        card.extend([f"- config_name: {config_name}", "  data_files:"])
        for split, rows in data.items():
            path = folder / config_name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(path)
            rows.to_json(path.with_suffix(".jsonl"))  # for the tokenizer
            card.extend([f"  - split: {split}", f"    path: {config_name}/{split}.parquet"])

    with mock.patch.object(DatasetDict, "push_to_hub", keep):
        module.main(test_size=0.1, push_to_hub=True, repo_id=folder.name)
    (folder / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


def make_tokenizer(
    texts: list[str], template: str | None, special: tuple[str, ...], ends: tuple[int | None, int, int | None]
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; `ends` are the places of bos, eos and padding among the special tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    bos, eos, pad = (None if place is None else special[place] for place in ends)
    if bos is not None and bos != eos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=pad)
    if template is not None:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


def make_model(config: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerFast, labels: int | None):
    """A model of random weights; matrices are larger than transformers makes them, so that every weight has a gradient
    that bfloat16 can hold."""
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    made = getattr(transformers, config)(**{**SHAPE, "vocab_size": len(tokenizer), **ends, **options})
    torch.manual_seed(0)
    if labels is None:
        model = AutoModelForCausalLM.from_config(made)
    else:
        made.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(made)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.1)
    return model.to(torch.bfloat16)


def make_remote(clone: Path, llama: Path, folder: Path) -> None:
    """TRL's model with code of its own, from the clone's source and the weights of a Llama."""
    shutil.copytree(llama, folder)
    for name in ("configuration_remote", "modeling_remote"):
        shutil.copy(clone / "scripts/generate_tiny_models/for_causal_lm/_remote_code" / f"{name}.py", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = ("Model", "ForCausalLM", "ForSequenceClassification")
    config |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "configuration_remote.RemoteConfig"} | {
        f"AutoModel{'' if name == 'Model' else name}": f"modeling_remote.Remote{name}" for name in classes
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
