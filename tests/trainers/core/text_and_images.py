"""Gemma 3 with its vision tower, tiny; and its runs. Run as a script on two processes: the model's folder, a folder."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.data import toy
from align.distributed.shards import whole
from tests.trainers.accelerate_setups import under
from tests.trainers.core.test_saved import lora, make

CASES = {"dpo": None, "dpo lora": lora(), "remax": None}


TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


def of_one_class(kind: str, folder) -> str:
    """A model that `AutoModelForCausalLM` does not know: mistral3, qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe."""
    import transformers as tf

    tokenizer = toy.tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, **ends}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "depth": 1, "out_hidden_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    if kind == "mistral3":
        of_images = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        vision = {name: vision[name] for name in ("hidden_size", "intermediate_size")} | of_images
        text_config = tf.MistralConfig(**text, head_dim=32)
        config = tf.Mistral3Config(
            text_config=text_config, vision_config=tf.PixtralVisionConfig(**vision), image_token_index=5
        )
    else:
        if kind == "qwen2_vl":
            vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        elif kind.startswith("qwen3"):
            vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
            rope["mrope_interleaved"] = True
            text["head_dim"] = 32
        if kind == "qwen3_vl_moe":
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        kinds = {"qwen2_vl": tf.Qwen2VLConfig, "qwen2_5_vl": tf.Qwen2_5_VLConfig, "qwen3_vl": tf.Qwen3VLConfig}
        kinds["qwen3_vl_moe"] = tf.Qwen3VLMoeConfig
        config = kinds[kind](text_config={**text, "rope_parameters": rope}, vision_config=vision, **TOKENS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = tf.AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.1)
        made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def gemma3(folder) -> str:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = toy.tokenizer()
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32},
        **{"max_position_embeddings": 64, "sliding_window": 32, "initializer_range": 0.1},
        **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None},
    }
    vision = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 14},
    }
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, eos_token_id=tokenizer.eos_token_id, **tokens)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(model: str, folder: Path) -> dict:
    """By case: losses, and the weights that were trained."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found = {}
    for case, peft in CASES.items():
        options = {"per_device_train_batch_size": 8 // processes, "logging_steps": 1}
        trainer = make(case.split()[0], model, folder / case, peft, **options)
        trainer.train()
        trainer.save_model()
        weights = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
        found[case] = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "weights": {name: whole(p).detach().clone() for name, p in weights.items() if p.requires_grad},
        }
        if hasattr(trainer, "close"):
            trainer.close()
        trainer.accelerator.wait_for_everyone()
    return found


if __name__ == "__main__":
    model, folder, setup = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo")
    with under(setup):
        found = train(model, folder)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
