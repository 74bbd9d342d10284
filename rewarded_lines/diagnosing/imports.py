"""What can be loaded: each library in a child of its own, where it may fail as it likes."""

from __future__ import annotations

from collections.abc import Sequence

from rewarded_lines.diagnosing.children import Reply, ask
from rewarded_lines.diagnosing.findings import Finding
from rewarded_lines.processes import VLLM_SETTINGS

# vLLM takes 7 to 11 s to import on two slow cores, more where nothing is compiled yet.
_SECONDS = 120.0
_ENGINE_SECONDS = 300.0
_VISION = ("torchvision", "torchaudio", "torchcodec")

_TORCH = """
import torch
cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
answer(version=torch.__version__, cuda=torch.version.cuda, cards=cards, threads=torch.get_num_threads())
"""
_BESIDE_TORCH = f"""
from importlib.util import find_spec
there, broken = [], {{}}
for name in {_VISION!r}:
    if find_spec(name) is not None:
        there.append(name)
        try:
            __import__(name)
        except BaseException as error:
            broken[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
answer(there=there, broken=broken)
"""
_TRANSFORMERS = """
import transformers
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
answer(version=transformers.__version__)
"""
_VLLM = """
import vllm
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
answer(version=vllm.__version__, device=current_platform.device_type)
"""
_ENGINE = """
import tempfile, time
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "film"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
with tempfile.TemporaryDirectory() as folder:
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    from vllm import LLM, SamplingParams
    began = time.perf_counter()
    from rewarded_lines.engines.vllm_core import share_of_gpu
    engine = LLM(folder, dtype="float32", max_model_len=64, enforce_eager=True, **share_of_gpu())
    built = time.perf_counter() - began
    said = engine.generate([{"prompt_token_ids": [1, 4, 5]}], SamplingParams(max_tokens=4, ignore_eos=True))
    answer(tokens=len(said[0].outputs[0].token_ids), seconds=round(built, 1))
"""


def check_torch(cards: Sequence[str]) -> list[Finding]:
    """Say whether torch loads, and whether it sees the GPUs that the driver lists.

    Args:
        cards: the GPUs, as the driver names them.
    """
    reply = ask(_TORCH, _SECONDS)
    if reply.failure:
        return [Finding("torch", "broken", reply.failure, "pip install --force-reinstall 'torch>=2.13,<3'")]
    told = reply.told
    build = f"CUDA {told['cuda']}" if told["cuda"] else "CPU build"
    return [Finding("torch", "ok", f"{told['version']}, {build}, {told['threads']} threads"), _gpu(cards, reply)]


def check_vision() -> Finding | None:
    """Say whether torch's sister packages fit it, if there are any: one that does not breaks others' imports."""
    reply = ask(_BESIDE_TORCH, _SECONDS)
    if reply.failure:
        return Finding("torchvision", "broken", reply.failure, f"pip uninstall -y {' '.join(_VISION)}")
    there, broken = reply.told["there"], reply.told["broken"]
    if not there:
        return None
    if broken:
        told = "; ".join(f"{name} does not fit torch: {why}" for name, why in broken.items())
        found = f"{told}. It breaks the imports of transformers, trl and vLLM, which all run without it"
        return Finding("torchvision", "broken", found, f"pip uninstall -y {' '.join(broken)}")
    return Finding("torchvision", "ok", f"{', '.join(there)}: fit torch")


def check_transformers() -> Finding:
    """Say whether models load."""
    reply = ask(_TRANSFORMERS, _SECONDS)
    if reply.failure:
        return Finding("transformers", "broken", reply.failure, "pip install --force-reinstall 'transformers==5.18.*'")
    return Finding("transformers", "ok", f"{reply.told['version']}: models load")


def check_vllm(thorough: bool) -> Finding | None:
    """Say whether vLLM starts; None where it is not installed, which the extras tell.

    Args:
        thorough: have it answer with a tiny random model.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        return None
    reply = ask(_VLLM, _SECONDS, VLLM_SETTINGS)
    remedy = "make setup VLLM=auto\nrewarded-lines sweep --engine hf   # meanwhile"
    if reply.failure:
        return Finding("vLLM", "broken", f"does not import: {reply.failure}", remedy)
    version, device = reply.told["version"], reply.told["device"]
    if not device:
        return Finding("vLLM", "broken", f"{version} finds neither a GPU nor its CPU build here", remedy)
    found = f"{version} for {device}"
    if not thorough:
        return Finding("vLLM", "ok", f"{found}; --thorough has it answer, too")
    reply = ask(_ENGINE, _ENGINE_SECONDS, VLLM_SETTINGS)
    if reply.failure:
        return Finding("vLLM", "broken", f"{found}, but no engine starts: {reply.failure}", remedy)
    seconds = reply.told["seconds"]
    return Finding("vLLM", "ok", f"{found}; an engine was built in {seconds} s and has answered")


def _gpu(cards: Sequence[str], reply: Reply) -> Finding:
    """Compare the GPUs that the driver lists with those that torch sees."""
    seen = reply.told["cards"]
    if seen:
        return Finding("GPU", "ok", "; ".join(cards or seen))
    if cards and reply.told["cuda"]:
        found = f"{'; '.join(cards)}, but torch cannot use it: an old driver, or CUDA_VISIBLE_DEVICES hides it"
        return Finding("GPU", "warning", found, "nvidia-smi\necho $CUDA_VISIBLE_DEVICES")
    if cards:
        found = f"{'; '.join(cards)}, but this torch is a CPU build"
        return Finding("GPU", "warning", found, "make setup VLLM=gpu")
    found = (
        "none: merge, inspect and report lose nothing; sweeps and training of models above some hundred million "
        "parameters take long"
    )
    return Finding("GPU", "warning", found, "make setup VLLM=gpu   # on a machine that has one")
