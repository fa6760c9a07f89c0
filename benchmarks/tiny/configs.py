"""Tiny configurations of transformers' model types, from their default ones."""

import copy
import inspect
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 80
"""Rows of the embeddings: the toy world's tokenizer has fewer tokens."""


def _by_name(*sizes: tuple[Any, str]) -> dict[str, Any]:
    return {name: size for size, names in sizes for name in names.split()}


TEXT = _by_name(
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (128, "max_position_embeddings n_positions max_seq_len n_ctx seq_length mamba_d_ssm"),
    (
        64,
        "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim dim_model intermediate_size "
        "ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_inner dim_ff dff feed_forward_size "
        "mlp_hidden_size intermediate_size_mlp prefix_dense_intermediate_size index_topk lru_width "
        "attention_hidden_size conv_dim sliding_window attention_chunk_size attention_window local_attention",
    ),
    (
        32,
        "shared_intermediate_size moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size expert_intermediate_size qk_head_dim mamba_d_head mamba_head_dim "
        "mamba_headdim",
    ),
    (
        16,
        "head_dim global_head_dim dim_head d_kv kv_channels swa_head_dim v_head_dim_swa swa_v_head_dim q_lora_rank "
        "kv_lora_rank o_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim linear_key_head_dim "
        "linear_head_dim linear_value_head_dim query_pre_attn_scalar",
    ),
    (8, "mamba_d_state ssm_state_size state_size hidden_size_per_layer_input laurel_rank mamba_chunk_size chunk_size"),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts num_local_experts "
        "linear_num_heads n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads n_mamba_heads mamba_dt_rank "
        "time_step_rank",
    ),
    (3, "conv_L_cache"),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_key_value_heads n_kv_heads num_global_key_value_heads swa_num_key_value_heads "
        "num_experts_per_tok moe_k top_k_experts moe_top_k experts_per_token moe_topk num_experts_per_token "
        "index_n_heads linear_num_key_heads linear_num_value_heads",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num n_group topk_group "
        "first_k_dense_replace num_dense_layers mamba_n_groups mamba_ngroups n_groups num_mem_blocks",
    ),
    (0, "moe_layer_start_index num_kv_shared_layers num_nextn_predict_layers mtp_num_layers num_mtp_layers"),
    (0.0, "attention_dropout hidden_dropout dropout"),
    (False, "use_mamba_kernels use_sliding_window add_cross_attention"),
    (None, "rope_scaling"),
    (70, "image_token_id image_token_index"),
    (71, "video_token_id video_token_index"),
    (72, "audio_token_id audio_token_index"),
    (73, "boi_token_id boi_token_index"),
    (74, "eoi_token_id eoi_token_index"),
    (75, "vision_start_token_id"),
    (76, "vision_end_token_id"),
    (77, "boa_token_id audio_start_token_id"),
    (78, "eoa_token_id eoa_token_index audio_end_token_id"),
    (79, "user_token_id"),
) | {"initializer_range": 0.1, "is_decoder": True, "use_cache": True}
"""Sizes by the names that configurations have for them. Heads are wide enough for what rotary parts ask."""
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OF_IMAGES = _by_name(
    (
        64,
        "intermediate_size out_hidden_size projection_dim encoder_ffn_dim output_hidden_size vision_output_dim "
        "projector_hidden_size output_dim text_hidden_size proj_hidden_size",
    ),
    (32, "hidden_size embed_dim d_model"),
    (28, "image_size"),
    (16, "head_dim subsample_size q_lora_rank"),
    (14, "patch_size"),
    (2, "num_attention_heads num_heads num_key_value_heads conf_num_attention_heads encoder_attention_heads"),
    (2.0, "mlp_ratio"),
    (1, "num_hidden_layers depth num_global_layers conf_num_hidden_layers encoder_layers"),
) | {"fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]}
WINDOWS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "codegen": {"rotary_dim": 16},
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": WINDOWS, "full_attention": WINDOWS}},
    "emu3": {"vocabulary_map": {"<image>": 70}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    "gptj": {"rotary_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mllama_text_model": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mlp"]},
    "phimoe": {"lm_head_bias": False},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ngram_vocab_size_base": 50, "split_ngram_parts": 1,
        "ple_embed_dim": 64, "ple_layer_ids": [1], "heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "local"], "axial_pos_embds": False, "num_buckets": 2, "local_attn_chunk_length": 4,
        "attention_head_size": 16,
    },
    "rembert": {"input_embedding_size": 64, "output_embedding_size": 64},
    "roc_bert": {
        "pronunciation_embed_dim": 16, "shape_embed_dim": 16, "pronunciation_vocab_size": 10, "shape_vocab_size": 10,
    },
    "rwkv": {"context_length": 128},
    "xlnet": {"d_head": 16},
    "xlstm": {"num_blocks": 2, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "attention_hidden_size": 128,
        "attention_head_dim": 32, "adapter_rank": 8,
    },
    "zaya": {
        "num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"], "num_hidden_layers": 2, "router_hidden_size": 16,
    },
}  # fmt: skip
"""What the tables of names do not make, by model type."""
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
LAYER_KINDS = ("layer_types", "layers_block_type")


def tiny_config(kind: str, sizes: dict[str, Any] = TEXT) -> PreTrainedConfig:
    """A configuration of the model type `kind` with two layers, or one of each kind that its default one has."""
    return _tiny(kind, CONFIG_MAPPING[kind], sizes)


def _tiny(kind: str, cls: Any, sizes: dict[str, Any]) -> PreTrainedConfig:
    try:
        default = cls().to_dict()
    except (StrictDataclassError, ValueError):  # those of Musicgen and VisionEncoderDecoder have no defaults
        default = {}
    own = OWN.get(kind, {})
    names = {*default, *inspect.signature(cls.__init__).parameters, *getattr(cls, "__dataclass_fields__", {})}
    options = {name: size for name, size in sizes.items() if name in names}
    off = [name for name in ("sliding_window", "num_global_key_value_heads") if default.get(name, 0) is None]
    options = {name: size for name, size in options.items() if name not in off} | ENDS
    if names & {"qk_rope_head_dim", "kv_lora_rank"}:  # latent attention has as many keys as queries
        options["num_key_value_heads"] = TEXT["num_attention_heads"]
    options |= _fewer_layers(default, names, own) | _rotary(default)
    for name, sub in (getattr(cls, "sub_configs", None) or {}).items():
        known = (default.get(name) or {}).get("model_type")
        sub = CONFIG_MAPPING[known] if known in CONFIG_MAPPING else sub
        if name not in own and sub.__name__ != "AutoConfig":
            options[name] = _tiny(getattr(sub, "model_type", ""), sub, TEXT if _is_text(name) else OF_IMAGES)
    return cls(**{**options, **own})


def _is_text(name: str) -> bool:
    return any(word in name for word in ("text", "llm", "language", "decoder", "thinker")) and "vision" not in name


def _fewer_layers(default: dict[str, Any], names: set[str], own: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, cut to the layers that are kept."""
    kinds = next((default[name] for name in LAYER_KINDS if isinstance(default.get(name), list)), [])
    kinds = [str(kind) for kind in kinds]
    if kinds and not own.keys() & {*LAYER_KINDS}:
        kept = sorted({kind: kinds.index(kind) for kind in kinds}.values())
        kept = kept if len(kept) > 1 else [0, len(kinds) - 1]
        counts = {name: len(kept) for name in LAYER_COUNTS[:4] if name in names}
        return counts | {
            name: [value[i] for i in kept]
            for name, value in default.items()
            if isinstance(value, list) and len(value) == len(kinds)
        }
    count = next((default[name] for name in LAYER_COUNTS if isinstance(default.get(name), int)), 0)
    lists = {name: value for name, value in default.items() if isinstance(value, list) and len(value) == count > 2}
    return {name: value[:1] + value[-1:] for name, value in lists.items()}


def _rotary(default: dict[str, Any]) -> dict[str, Any]:
    """Positions in time, height and width in sections that fit the small heads."""
    rope = copy.deepcopy(default.get("rope_parameters"))
    if "mrope_section" not in str(rope):
        return {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and "mrope_section" in part:
            share = part.get("partial_rotary_factor", default.get("partial_rotary_factor")) or 1.0
            half = int(TEXT["head_dim"] * share) // 2
            part["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return {"rope_parameters": rope}


def tiny_model(config: PreTrainedConfig, auto_class: Any, **options: Any) -> torch.nn.Module:
    """Random weights of one seed, large enough that log-probs depend on what was read."""
    torch.manual_seed(0)
    model = auto_class.from_config(config, dtype=torch.float32, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.normal_(0, 0.1)
        for name, p in model.named_parameters():
            of_experts = p.dim() == 3 and "expert" in name
            if of_experts or not p.isfinite().all() or p.abs().max() > 1e4:  # some are left as they lie in memory
                p.normal_(0, 0.1)
    return model
