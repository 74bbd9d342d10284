"""A table of the names that one tensor has: in the file of a release, in memory, and in the file of another version.

The facts are transformers' own (`conversion_mapping.py`, `_keys_to_ignore_on_load_unexpected`, version 5.19). Names are
whole modules: `gate` is in `mlp.gate.weight`, not in `mlp.gate_proj.weight`.
"""

from __future__ import annotations

# Modules that trainers and compilers put around others, and the ones that a wrapping class puts around a text model.
WRAPPERS = frozenset(
    ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    + ("module", "model", "language_model", "text_model", "llm")
)
# Modules around a whole model; further inside, the name may mean another thing.
ROOTS = frozenset("transformer policy pretrained_model base_model actor actor_module backbone".split())

# Each pair means the same; the first is replaced by the second, in this order. "^": only at the start of a name.
SYNONYMS: tuple[tuple[str, str], ...] = (
    # Weights of normalizations as their first TensorFlow and torch versions named them.
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    ("weight_g", "parametrizations.weight.original0"),
    ("weight_v", "parametrizations.weight.original1"),
    # GPT-NeoX, DeepSeek-V4, Inkling.
    ("^embed_out", "lm_head"),
    ("^head", "lm_head"),
    ("^unembed", "lm_head"),
    ("^embed", "embed_tokens"),
    # Mixtures of experts: Mixtral, MiniMax, Phi, Granite, Aria, Hunyuan, Ernie, Exaone, Laguna, Step, A.X.
    ("block_sparse_moe", "mlp"),
    ("moe", "mlp"),
    ("ffn", "mlp"),
    ("mlp.router.gate", "mlp.gate"),
    ("mlp.router.layer", "mlp.gate"),
    ("mlp.router", "mlp.gate"),
    ("mlp.input_linear.weight", "mlp.experts.gate_up_proj"),
    ("mlp.output_linear.weight", "mlp.experts.down_proj"),
    ("experts.fc1.weight", "experts.gate_up_proj"),
    ("experts.fc2.weight", "experts.down_proj"),
    ("mlp.shared_mlp", "mlp.shared_experts"),
    ("mlp.shared_expert", "mlp.shared_experts"),
    ("share_expert", "mlp.shared_experts"),
    ("shared_experts.w1", "shared_experts.gate_proj"),
    ("shared_experts.w2", "shared_experts.down_proj"),
    ("shared_experts.w3", "shared_experts.up_proj"),
    ("mlp.expert_bias", "mlp.e_score_correction_bias"),
    ("mlp.router_bias", "mlp.e_score_correction_bias"),
    ("mlp.gate.bias", "mlp.e_score_correction_bias"),
    ("gate.e_score_correction_bias", "e_score_correction_bias"),
    ("experts.e_score_correction_bias", "e_score_correction_bias"),
    ("gate.moe_statics", "moe_statics"),
    ("mlp.post_mlp_layernorm", "post_mlp_layernorm"),
    # Attention: DeepSeek-V4, MiMo, Hunyuan, Kimi-Linear, MiniMax-M3, OLMo-Hybrid, LFM3.
    ("attn", "self_attn"),
    ("indexer.compressor", "compressor.indexer"),
    ("indexer.weights_proj", "compressor.indexer.scorer.weights_proj"),
    ("indexer.wq_b", "compressor.indexer.q_b_proj"),
    ("self_attn.norm", "self_attn.kv_norm"),
    ("compressor.norm", "compressor.kv_norm"),
    ("compressor.indexer.norm", "compressor.indexer.kv_norm"),
    ("ape", "position_bias"),
    ("wq_a", "q_a_proj"),
    ("wq_b", "q_b_proj"),
    ("wkv", "kv_proj"),
    ("wgate", "gate_proj"),
    ("wo_a", "o_a_proj"),
    ("wo_b", "o_b_proj"),
    ("self_attn.q_norm", "self_attn.q_a_norm"),
    ("self_attn.q_gate_proj", "self_attn.q_b_proj"),
    ("linear_gate", "gate_proj"),
    ("self_attn.g_proj", "self_attn.gate_proj"),
    ("self_attn.index_q_proj", "self_attn.indexer.q_proj"),
    ("self_attn.index_k_proj", "self_attn.indexer.k_proj"),
    ("self_attn.index_q_norm", "self_attn.indexer.q_norm"),
    ("self_attn.index_k_norm", "self_attn.indexer.k_norm"),
    ("self_attn.forget_gate", "self_attn"),
    ("attn_sink", "sinks"),
    ("attention_sink_bias", "sinks"),
    ("learnable_sink_param", "sinks"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attention_layer_norm", "input_layernorm"),
    ("feedforward_layer_norm", "post_attention_layernorm"),
    ("W_down", "mlp.fc1"),
    ("W_up", "mlp.fc2"),
    # Hyper-connections of DeepSeek-V4 and Hunyuan.
    ("hc_pre", ""),
    ("hc_head", ""),
    *((f"hc_head_{part}", f"hc_{part}") for part in ("fn", "base", "scale")),
    *((f"hc_attn_{part}", f"attn_hc.{part}") for part in ("fn", "base", "scale")),
    *((f"hc_ffn_{part}", f"ffn_hc.{part}") for part in ("fn", "base", "scale")),
    *((f"hc_attn_layer.hc_{part}", f"attn_hc.{part}") for part in ("fn", "base", "scale")),
    *((f"hc_mlp_layer.hc_{part}", f"ffn_hc.{part}") for part in ("fn", "base", "scale")),
    # Lists of blocks: transformers saves the text of Kimi-K2.5 and Qianfan-OCR under the names of their towers.
    ("blocks", "layers"),
    ("^encoder.layers", "layers"),
    # Towers and what joins them to the text model.
    ("^vision_model", "vision_tower"),
    ("^vit", "vision_tower"),
    ("vision_model", ""),
    ("vision_tower.encoder", "vision_tower"),
    ("^mlp_AR", "projector"),
    ("^vision_projector", "projector"),
    ("^vit_large_projector", "multi_modal_projector"),
    ("^mlp1.0", "multi_modal_projector.layer_norm"),
    ("^mlp1.1", "multi_modal_projector.linear_1"),
    ("^mlp1.3", "multi_modal_projector.linear_2"),
    ("^patch_merge_mlp.linear_1", "multi_modal_projector.merge_linear_1"),
    ("^patch_merge_mlp.linear_2", "multi_modal_projector.merge_linear_2"),
    ("^vision_embedder", "embed_vision"),
    ("embed_vision.multimodal_embedder", "embed_vision"),
    ("patchifier", "patch_embed"),
    ("mm_projector.proj.0", "mm_projector.in_proj"),
    ("mm_projector.proj.2", "mm_projector.out_proj"),
    ("^perceive", "patch_merger"),
    ("patch_merger.proj.0", "patch_merger.proj_conv"),
    ("patch_merger.proj.2", "patch_merger.proj_out"),
    ("dense_h_to_4h", "fc1"),
    ("dense_4h_to_h", "fc2"),
    ("ls1", "lambda_1"),
    ("ls2", "lambda_2"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attention.projection_layer", "self_attn.proj"),
    ("attention.q_proj", "self_attn.q_proj"),
    ("attention.k_proj", "self_attn.k_proj"),
    ("attention.v_proj", "self_attn.v_proj"),
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding", "embeddings.patch_embeddings.projection"),
    ("embeddings.proj", "embeddings.patch_embeddings.projection"),
)

# A tensor that holds others, one after another along its first axis: its name, and theirs. "*": one for every expert,
# so that the tensor has an axis more and each expert's parts follow one another.
FUSIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("experts.gate_up_proj", ("experts.*.gate_proj.weight", "experts.*.up_proj.weight")),
    ("experts.gate_up_proj", ("experts.*.w1.weight", "experts.*.w3.weight")),
    ("experts.down_proj", ("experts.*.down_proj.weight",)),
    ("experts.down_proj", ("experts.*.w2.weight",)),
    ("experts.up_proj", ("experts.*.up_proj.weight",)),
    ("conv1d.weight", ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")),
    ("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    ("shared_experts.gate_up_proj.weight", ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight")),
    *(
        (f"self_attn.qkv.{kind}", tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv"))
        for kind in ("weight", "bias")
    ),
    ("self_attn.gqkv_proj.weight", tuple(f"self_attn.{part}_proj.weight" for part in ("gate", "q", "k", "v"))),
)

# Transformers 5 exchanges the last two axes of the fused experts when it loads a release of these families.
TRANSPOSED = frozenset(("qwen3_vl_moe", "qwen3_vl_moe_text"))

# A count that starts at zero in one spelling and at one in the other, in one release (Kimi-K2.5): if a file has the
# first name of a row, its names are those on the left.
SHIFTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("norm0", "norm1"), ("norm1", "norm2")),
    (("mlp.fc0", "mlp.fc1"), ("mlp.fc1", "mlp.fc2")),
)

# Leftovers of a training in a release, which transformers loads in no class; names are without `WRAPPERS`.
LEFT_OVER = (
    r"packing_position_embedding\.",
    r"(visual\.)?vision_model\.head\.",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    r"preprocessor\.featurizer\.",
    r"(sound_encoder|audio_tower)\.(encoder\.)?feature_extractor\.",
)
# A block after the last one has one of these modules if it predicts further tokens (DeepSeek-V3, GLM-4.5).
PREDICTS_FURTHER = ("eh_proj", "shared_head", "enorm", "hnorm")
# How the names of towers that see or hear begin, and of what joins them to the text model; without `WRAPPERS`.
TOWERS = (
    *("visual", "vit", "vision", "image", "video", "audio", "speech", "sound", "acoustic", "vqmodel", "multi_modal"),
    *("mm_", "mlp_AR", "mlp1", "connector", "aligner", "qformer", "query_tokens", "perceive", "resampler"),
    *("embed_vision", "embed_audio", "projector", "language_projection", "modality_projection", "patch_merge"),
)
