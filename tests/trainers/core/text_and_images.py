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
