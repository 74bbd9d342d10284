"""Tiny random models, one of each architecture that a merge must know, built from transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TOKENS = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Weights so large that greedy decoding has clear winners.
COMMON = {
    **TOKENS,
    "initializer_range": 0.2,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
BERT = {**COMMON, "intermediate_size": 96}
LLAMA = {**BERT, "num_key_value_heads": 1, "head_dim": 32}
GEMMA = {**LLAMA, "query_pre_attn_scalar": 32, "sliding_window": 16}
QWEN_MOE = {**LLAMA, "moe_intermediate_size": 48, "num_experts": 2, "num_experts_per_tok": 1}
MIXTRAL = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}
PHI3 = {**LLAMA, "num_key_value_heads": 2}
GPT2 = {**TOKENS, "initializer_range": 0.2, "n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 128}
OPT = {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64}
# More encoder than decoder blocks: transformers sizes the cache by the encoder's number and fails the other way round.
T5 = {
    **TOKENS,
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BART = {
    **TOKENS,
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
}
DISTILBERT = {**TOKENS, "dim": 64, "n_heads": 2, "n_layers": 3, "hidden_dim": 96, "max_position_embeddings": 128}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
CLIP = {"text_config": BERT, "vision_config": VISION, "projection_dim": 32}
SIGLIP = {"text_config": {**BERT, "projection_size": 64}, "vision_config": VISION}
LLAVA = {
    "text_config": {**LLAMA, "model_type": "llama"},
    "vision_config": {**VISION, "model_type": "clip_vision_model"},
    "image_token_index": 299,
}
GEMMA3 = {
    "text_config": GEMMA,
    "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    "mm_tokens_per_image": 4,
}
QWEN_TEXT = {**LLAMA, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
QWEN_EYE = {"depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": 8}
QWEN2_VL = {"text_config": QWEN_TEXT, "vision_config": {**QWEN_EYE, "embed_dim": 64, "mlp_ratio": 2}}
QWEN3_EYE = {"out_hidden_size": 64, "intermediate_size": 96, "deepstack_visual_indexes": [0, 1]}
# The published configs say "default"; with "mrope" transformers does not make this class.
QWEN3_TEXT = {**LLAMA, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
QWEN3_VL = {"text_config": QWEN3_TEXT, "vision_config": {**QWEN_EYE, **QWEN3_EYE}}


def _builder(model: str, config: str, settings: dict[str, Any], **more: Any) -> Callable[[], Any]:
    """Return a function that makes the model, the same one at every call."""

    def build() -> Any:
        import torch
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**{**settings, **more})).eval()

    return build


# Language models that generate from a prompt alone.
CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": _builder("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-tied": _builder("LlamaForCausalLM", "LlamaConfig", LLAMA, tie_word_embeddings=True),
    "mistral": _builder("MistralForCausalLM", "MistralConfig", LLAMA),
    "mixtral": _builder("MixtralForCausalLM", "MixtralConfig", MIXTRAL),
    "qwen2": _builder("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen2-moe": _builder("Qwen2MoeForCausalLM", "Qwen2MoeConfig", QWEN_MOE, shared_expert_intermediate_size=48),
    "qwen3": _builder("Qwen3ForCausalLM", "Qwen3Config", LLAMA),
    "qwen3-moe": _builder("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN_MOE),
    "gemma": _builder("GemmaForCausalLM", "GemmaConfig", LLAMA),
    "gemma2": _builder("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3": _builder("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "phi": _builder("PhiForCausalLM", "PhiConfig", BERT),
    "phi3": _builder("Phi3ForCausalLM", "Phi3Config", PHI3),
    "gpt2": _builder("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt-neox": _builder("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "opt": _builder("OPTForCausalLM", "OPTConfig", OPT),
    "opt-projected": _builder("OPTForCausalLM", "OPTConfig", OPT, word_embed_proj_dim=32),
    "falcon": _builder("FalconForCausalLM", "FalconConfig", COMMON),
    "falcon-new": _builder("FalconForCausalLM", "FalconConfig", COMMON, new_decoder_architecture=True),
}
# The same families without a head, or with another one.
BASES: dict[str, Callable[[], Any]] = {
    "llama-base": _builder("LlamaModel", "LlamaConfig", LLAMA),
    "qwen2-base": _builder("Qwen2Model", "Qwen2Config", LLAMA),
    "mixtral-base": _builder("MixtralModel", "MixtralConfig", MIXTRAL),
    "phi-base": _builder("PhiModel", "PhiConfig", BERT),
    "gpt2-base": _builder("GPT2Model", "GPT2Config", GPT2),
    "gpt-neox-base": _builder("GPTNeoXModel", "GPTNeoXConfig", BERT),
    "opt-base": _builder("OPTModel", "OPTConfig", OPT),
    "falcon-base": _builder("FalconModel", "FalconConfig", COMMON),
}
REWARDS: dict[str, Callable[[], Any]] = {
    "llama-reward": _builder("LlamaForSequenceClassification", "LlamaConfig", LLAMA),
    "llama-answers": _builder("LlamaForQuestionAnswering", "LlamaConfig", LLAMA),
    "gpt2-reward": _builder("GPT2ForSequenceClassification", "GPT2Config", GPT2),
    "gpt2-tokens": _builder("GPT2ForTokenClassification", "GPT2Config", GPT2),
    "gpt-neox-reward": _builder("GPTNeoXForSequenceClassification", "GPTNeoXConfig", BERT),
    "opt-reward": _builder("OPTForSequenceClassification", "OPTConfig", OPT),
    "falcon-reward": _builder("FalconForSequenceClassification", "FalconConfig", COMMON),
}
ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "t5": _builder("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": _builder("T5ForConditionalGeneration", "T5Config", T5, feed_forward_proj="gated-gelu"),
    "t5-base": _builder("T5Model", "T5Config", T5),
    "t5-encoder": _builder("T5EncoderModel", "T5Config", T5),
    "t5-reward": _builder("T5ForSequenceClassification", "T5Config", T5),
    "t5-tokens": _builder("T5ForTokenClassification", "T5Config", T5),
    "mt5": _builder("MT5ForConditionalGeneration", "MT5Config", T5),
    "bart": _builder("BartForConditionalGeneration", "BartConfig", BART),
    "bart-base": _builder("BartModel", "BartConfig", BART),
    "bart-decoder": _builder("BartForCausalLM", "BartConfig", BART),
    "bart-reward": _builder("BartForSequenceClassification", "BartConfig", BART),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": _builder("BertForSequenceClassification", "BertConfig", BERT),
    "bert-base": _builder("BertModel", "BertConfig", BERT),
    "bert-masked": _builder("BertForMaskedLM", "BertConfig", BERT),
    "roberta": _builder("RobertaForSequenceClassification", "RobertaConfig", BERT),
    "roberta-masked": _builder("RobertaForMaskedLM", "RobertaConfig", BERT),
    "electra": _builder("ElectraForSequenceClassification", "ElectraConfig", BERT, embedding_size=32),
    "distilbert": _builder("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT),
}
IMAGES: dict[str, Callable[[], Any]] = {
    "vit": _builder("ViTForImageClassification", "ViTConfig", VISION),
    "vit-base": _builder("ViTModel", "ViTConfig", VISION),
    "clip": _builder("CLIPModel", "CLIPConfig", CLIP),
    "clip-classifier": _builder("CLIPForImageClassification", "CLIPConfig", CLIP),
    "clip-text": _builder("CLIPTextModel", "CLIPTextConfig", BERT),
    "clip-text-projected": _builder("CLIPTextModelWithProjection", "CLIPTextConfig", BERT),
    "clip-vision": _builder("CLIPVisionModel", "CLIPVisionConfig", VISION),
    "clip-vision-projected": _builder("CLIPVisionModelWithProjection", "CLIPVisionConfig", VISION),
    "siglip": _builder("SiglipModel", "SiglipConfig", SIGLIP),
    "llava": _builder("LlavaForConditionalGeneration", "LlavaConfig", LLAVA),
    "gemma3-images": _builder("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA3),
    "qwen2-vl": _builder("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", QWEN2_VL),
    "qwen3-vl": _builder("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", QWEN3_VL),
}
ARCHITECTURES = {**CAUSAL, **BASES, **REWARDS, **ENCODER_DECODERS, **ENCODERS, **IMAGES}
