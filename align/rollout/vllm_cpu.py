"""What vLLM needs on CPUs: a key-value cache of stated size, heads that its kernels know, cheap draws, packed heads."""

import logging

import torch

from align.errors import ConfigError
from align.rollout.sampling import draw_tokens

logger = logging.getLogger(__name__)

GIB = 1 << 30
CPU_BLOCK = 32  # tokens per block of the key-value cache on CPUs; prompts share whole blocks, so the smallest is best
CPU_MEMORY_SHARE = 0.25  # of the free memory, at most, for the key-value cache
USE_TRANSFORMERS = "set rollout.backend: transformers (of commands that only draw: --backend transformers)"


def draw_by_row(worker) -> None:
    """Draw seeded tokens with one random number per row (runs inside vLLM, on CPUs).

    vLLM gives every token of the vocabulary a random number from the row's own generator, in a loop over the rows: with
    4,096 tokens a third of the time of a small model. The distribution is the same, and so is what a draw depends on.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    def forward(logits, generators, k, p):
        logps = apply_top_k_top_p(logits, k, p).log_softmax(-1, dtype=torch.float32)
        uniforms = torch.rand(len(logps), dtype=torch.float64)  # stays so in rows without a seed
        for row, generator in generators.items():
            uniforms[row] = torch.rand((), dtype=torch.float64, generator=generator)
        return draw_tokens(logps, uniforms), logps

    worker.model_runner.sampler.topk_topp_sampler.forward = forward


def repack_heads(model) -> None:
    """Make the output heads use the new weights on CPUs (runs inside vLLM).

    Its CPU kernels work on a packed copy of each weight. `reload_weights` packs anew what it loads, but a head that
    shares its weight with the input embedding is not loaded itself and would go on with the old one.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def check_head_size(config) -> None:
    """Refuse attention heads that vLLM's CPU kernels lack."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, sizes = head_size(config), CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise ConfigError(
            f"vLLM on CPUs cannot run attention heads of size {size} (only {', '.join(map(str, sizes))}): "
            f"{USE_TRANSFORMERS}"
        )


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_cache_bytes(core, dtype, max_model_len: int, max_num_seqs: int, kv_cache_gib: float | None) -> int:
    """Size of the key-value cache on CPUs: `kv_cache_gib` if given; else room for `max_num_seqs` sequences of full
    length, within a share of the free memory. vLLM queues the sequences that do not fit; one of full length must."""
    import psutil

    config = core.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * head_size(config) * dtype.itemsize
    one = -(-max_model_len // CPU_BLOCK) * CPU_BLOCK * token
    if kv_cache_gib is not None:
        size = int(kv_cache_gib * GIB)
    else:
        size = min(one * max_num_seqs, int(psutil.virtual_memory().available * CPU_MEMORY_SHARE))
    if size < one:
        raise ConfigError(
            f"the key-value cache of the rollout engine ({size / GIB:.2f} GiB) has no room for one sequence of "
            f"max_model_len={max_model_len} tokens ({one / GIB:.2f} GiB): lower max_model_len, or give it more memory"
        )
    logger.info("vLLM key-value cache: %.2f GiB, room for %d sequences of full length", size / GIB, size // one)
    return size
