"""Tiny checkpoints whose weights are stored in FP8 or MXFP4, as published ones are, and what these weights are."""

import json
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from align.data import toy

BLOCK = 16
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
FP8_FORM = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
MXFP4_FORM = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def stored(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Writes a model (`dense` and `mixture` in FP8, `gpt_oss` in MXFP4) and its tokenizer; its tensors in ordinary
    numbers, by the names that an ordinary checkpoint has."""
    tokenizer = toy.tokenizer()
    model = made(kind, len(tokenizer), tokenizer.eos_token_id).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written: dict[str, torch.Tensor] = {}
    ordinary: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts, ordinary[name] = (_mxfp4 if kind == "gpt_oss" else _fp8)(name, tensor)
        written |= parts
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = MXFP4_FORM if kind == "gpt_oss" else FP8_FORM
    (folder / "config.json").write_text(json.dumps(config))
    return ordinary


def made(kind: str, vocab_size: int, end: int):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": end, "eos_token_id": end,
        "bos_token_id": None,
    }  # fmt: skip
    few = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if kind == "dense":
        return tf.Qwen3ForCausalLM(tf.Qwen3Config(**sizes))
    if kind == "mixture":
        return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes, **few, num_experts=4))
    return tf.GptOssForCausalLM(tf.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))


def _fp8(name: str, tensor: torch.Tensor):
    if tensor.ndim < 2 or "proj" not in name:
        return {name: tensor}, tensor.float()
    scales = torch.rand(-(-tensor.shape[0] // BLOCK), -(-tensor.shape[1] // BLOCK)) + 0.5
    whole = scales.repeat_interleave(BLOCK, 0)[: tensor.shape[0]].repeat_interleave(BLOCK, 1)[:, : tensor.shape[1]]
    eight = (tensor.float() / whole).to(torch.float8_e4m3fn)
    return {name: eight, f"{name}_scale_inv": scales}, eight.float() * whole


def _mxfp4(name: str, tensor: torch.Tensor):
    """Blocks of 32 numbers along the inputs, two in a byte, the lower one first; the model holds experts transposed."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}, tensor.float()
    experts, inputs, outputs = tensor.shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    scales = torch.randint(119, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
    numbers = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
    numbers = numbers * (2.0 ** (scales.float() - 127))[..., None]
    whole = numbers.reshape(experts, outputs, inputs).transpose(1, 2).contiguous()
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, whole
