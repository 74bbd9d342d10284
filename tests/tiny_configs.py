"""A tiny model of any language or image-text class of transformers: the class's own defaults, with small sizes.

Most classes need nothing but the sizes; what a class needs besides is in `MORE`.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 320
LARGEST = 16_000_000
# Lists of blocks of different kinds have different lengths, so that none passes for another.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "width", "hidden_dim"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_decoder_layers",), 4),
    **dict.fromkeys(("encoder_layers", "encoder_num_hidden_layers"), 5),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim",), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "projector_hidden_size", "ffn_hidden_size"), 64),
    **dict.fromkeys(("vocab_size_per_layer_input", "encoder_hash_byte_group_vocab", "num_embeddings"), VOCABULARY),
    **dict.fromkeys(("dim_ff", "alignment_intermediate_size"), 96),
    **dict.fromkeys(("dim_head", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("base_channels", "latent_channels", "expert_ffn_hidden_size"), 32),
    "zero_expert_num": 2,
    "depth": 6,
}
# In the config of a tower.
TOWER: dict[str, Any] = {**SIZES, "num_hidden_layers": 6, "num_layers": 6, "n_layers": 6}
_GEMMA_TEXT = {"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": VOCABULARY}
_GEMMA_ASSISTANT = {
    **{key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    **{key: SIZES[key] for key in ("vocab_size", "num_key_value_heads", "head_dim")},
    **{**_GEMMA_TEXT, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    **{"num_kv_shared_layers": 4, "model_type": "gemma4_text"},
}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
_INDEXER = {
    **{"indexer_compress_ratio": 4, "indexer_budget": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1},
    "indexer_head_dim": 16,
}
_FLORENCE_EYE = {
    **{"depths": [1, 1, 2, 1], "embed_dim": [16, 32, 48, 64], "num_heads": [2, 2, 4, 4], "num_groups": [2, 2, 4, 4]},
    "projection_dim": 64,
}
# What a class needs besides sizes, with dots for nested configs; None takes a setting away.
MORE: dict[str, dict[str, Any]] = {
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 5}},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": _SECTIONS}},
    "CohereCompassForConditionalGeneration": {"text_config.rope_parameters": {"full_attention": _SECTIONS}},
    "Cosmos3EdgeForConditionalGeneration": {"text_config.rope_parameters": _SECTIONS},
    "CsmDepthDecoderForCausalLM": {"backbone_hidden_size": 64},
    "DbrxForCausalLM": {"attn_config.rope_theta": 1e4, "ffn_config.hidden_size": 64},
    "DeepseekOcr2ForConditionalGeneration": {"text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "Dots1ForCausalLM": {"n_shared_experts": 1},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        **{"text_config.moe_intermediate_size": [32, 48], "text_config.rope_parameters": _SECTIONS}
    },
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {
            **{**_GEMMA_ASSISTANT, "model_type": "diffusion_gemma_text", "num_experts": 4, "top_k_experts": 2},
            "moe_intermediate_size": 32,
        },
        "vision_config": {
            **{key: TOWER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")},
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "patch_size": 8, "model_type": "gemma4_vision"},
        },
    },
    "Florence2ForConditionalGeneration": {f"vision_config.{key}": value for key, value in _FLORENCE_EYE.items()},
    "Gemma3nForCausalLM": {
        **{**_GEMMA_TEXT, "num_kv_shared_layers": 0, "intermediate_size": 96, "altup_num_inputs": 2},
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "Gemma4AssistantForCausalLM": {"text_config": _GEMMA_ASSISTANT, "backbone_hidden_size": 64},
    "Gemma4UnifiedAssistantForCausalLM": {
        "text_config": {**_GEMMA_ASSISTANT, "model_type": "gemma4_unified_text"},
        "backbone_hidden_size": 64,
    },
    "Glm5NextForConditionalGeneration": {"text_config.num_key_value_heads": 4, "text_config.qk_rope_head_dim": 0},
    "Granite4VisionForConditionalGeneration": {
        **{"text_config.model_type": "granite", "deepstack_layer_map": [[0, 1], [1, 2]], "downsample_rate": "1/2"},
        **{"qformer_config.num_hidden_layers": 1, "spatial_target_layers": [2, 3]},
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Llama4ForConditionalGeneration": {
        f"vision_config.{key}": 64 for key in ("vision_output_dim", "projector_input_dim", "projector_output_dim")
    },
    "Mamba2ForCausalLM": {"num_heads": 8, "n_groups": 2},
    "NemotronH_Omni_Reasoning_V3": {"vision_config.video_temporal_patch_size": 2},
    "Qwen4ExpForCausalLM": _INDEXER,
    "Qwen4ExpForConditionalGeneration": {f"text_config.{key}": value for key, value in _INDEXER.items()},
    "ReformerModelWithLMHead": {"is_decoder": True, "axial_pos_embds_dim": (16, 48)},
    "RoCBertForCausalLM": {
        **{"pronunciation_vocab_size": 50, "shape_vocab_size": 50, "pronunciation_embed_dim": 64, "shape_embed_dim": 64}
    },
    "VisionEncoderDecoderModel": {
        "encoder": {"model_type": "vit", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6},
        "decoder": {"model_type": "gpt2", "add_cross_attention": True, "n_embd": 64, "n_layer": 4, "n_head": 4},
    },
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}
CONFIGS = {
    "CsmDepthDecoderForCausalLM": "CsmDepthDecoderConfig",
}


def tiny_config(name: str) -> Any:
    """Return a small config for the model class `name`."""
    import transformers

    config = getattr(transformers, CONFIGS[name]) if name in CONFIGS else getattr(transformers, name).config_class
    settings = {} if name == "VisionEncoderDecoderModel" else _settings(config, SIZES)
    for key, value in MORE.get(name, {}).items():
        *parts, last = key.split(".")
        place = settings
        for part in parts:
            place = place.setdefault(part, {})
        if value is None and last in place:
            del place[last]
        else:
            place[last] = value
    return config(**settings)


def tiny_model(name: str) -> Any:
    """Return a tiny random model of a class; raise what transformers raises."""
    import torch
    import transformers

    kind, config = getattr(transformers, name), tiny_config(name)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are not tiny")
    torch.manual_seed(0)
    return kind(config)


def _settings(config: type, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the small settings that a config class takes, by its own defaults."""
    default = config()
    values = default.to_dict()
    found = {key: sizes[key] for key in values if key in sizes and isinstance(values[key], int | type(None))}
    for key, value in values.items():
        if key.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            found[key] = VOCABULARY - 1 - len(found) % 100
    layers = next((values[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in values), None)
    for key, value in values.items():
        if isinstance(value, list) and len(value) == layers and layers:
            found[key] = _sample(value, sizes["num_hidden_layers"])
    for key in getattr(config, "sub_configs", {}):
        inner = getattr(default, key, None)
        if inner is not None:
            small = _settings(type(inner), SIZES if "text" in key or "decoder" in key else TOWER)
            found[key] = {"model_type": inner.model_type, **small}
    return found


def _sample(values: list[Any], count: int) -> list[Any]:
    """Return `count` of the values, with one of each kind as far as there is room."""
    kinds = list(dict.fromkeys(map(repr, values)))
    first = [next(value for value in values if repr(value) == kind) for kind in kinds][:count]
    return (first * count)[:count]
