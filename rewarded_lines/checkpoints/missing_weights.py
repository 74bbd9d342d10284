"""Folders without weights that can be read: what lies there instead, and what makes weights of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from rewarded_lines.errors import UserError, fail
from rewarded_lines.folders import json_object_in

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What trainers pickle beside weights.
_STATES = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)\w*\.\w+")
# Pickles that `from_pretrained` reads.
_LOADED = re.compile(r"(pytorch_model|adapter_model)[\w.-]*\.bin")
_CONVERT = "python -c \"from {load} as M; M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# By the task of an adapter, the end of PEFT's class that loads it with its base.
_TASKS = {"SEQ_CLS": "SequenceClassification", "SEQ_2_SEQ_LM": "Seq2SeqLM", "TOKEN_CLS": "TokenClassification"}
_ENGINES = {".gguf": "GGUF", ".onnx": "ONNX", "openvino_model.xml": "OpenVINO"}
_SHOWN = 3
UNGATHERED = (
    "DeepSpeed's ZeRO-3 leaves tensors empty if it does not gather them: save again with "
    "stage3_gather_16bit_weights_on_model_save, or join its shards with zero_to_fp32.py"
)


def no_weights(folder: Path, expected: str, kind: str = "") -> UserError:
    """Return the error for a folder without weights."""
    remedy = next(_remedies(folder), "")
    names = [path.name for pattern in _PICKLED for path in folder.glob(pattern)]
    pickled = sorted(name for name in names if not _STATES.fullmatch(name))
    if pickled and not remedy:
        convert = "by " + _CONVERT.format(load=_import(folder), folder=folder)
        if not all(map(_LOADED.fullmatch, pickled)):
            convert = "with the tool that wrote it, into what save_pretrained writes"
        convert += "; and copy the tokenizer's files there"
        return fail(
            "pickled weights are never opened: loading a pickle runs code from it",
            where=str(folder),
            expected=expected,
            got=", ".join(pickled[:_SHOWN]),
            remedy=f"if you trust the file, convert it {convert}",
        )
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "an empty folder"
    return fail(f"no {kind}weights there", where=str(folder), expected=expected, got=found, remedy=remedy)


def model_class(folder: Path) -> str:
    """Return transformers' class for a checkpoint: by another one a head would be lost, or nothing be loaded."""
    config = json_object_in(folder / "config.json")
    names = config.get("architectures")
    name = str(names[0]).removeprefix("FSDP") if isinstance(names, list) and names else ""
    # A class of its own is found by `auto_map`.
    return name if name.isidentifier() and "auto_map" not in config else "AutoModelForCausalLM"


def for_inference(files: Iterable[Path]) -> str:
    """Return the remedy for files of engines that only run a model, or ""."""
    kinds = (kind for file in files for end, kind in _ENGINES.items() if file.name.endswith(end))
    kind = next(kinds, "")
    return kind and f"{kind} is for inference: give the checkpoint that it was made from"


def _import(folder: Path) -> str:
    """Return the import of the class that loads a folder's pickled weights."""
    adapter = json_object_in(folder / "adapter_config.json")
    if not adapter:
        return f"transformers import {model_class(folder)}"
    return f"peft import AutoPeftModelFor{_TASKS.get(str(adapter.get('task_type')), 'CausalLM')}"


def fold(adapter: Path) -> str:
    """Return how an adapter becomes a whole model, which can be a base."""
    own = json_object_in(adapter / "adapter_config.json").get("base_model_name_or_path")
    base, folder, out = (shlex.quote(str(text)) for text in (own or "BASE", adapter, f"{adapter}-full"))
    command = f"rewarded-lines merge --base {base} --policy {folder} --lam 1 --beta 0 --as full --out {out}"
    return f"fold it into the model that it was trained on, and give the result: {command}"


def _remedies(folder: Path) -> Iterator[str]:
    """Yield what makes readable weights of what lies in a folder, the surest first."""
    if (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_config.json").is_file():
        yield f"an adapter is no base: {fold(folder)}"
    # Checkpoints of a trainer, adapters with a name, and snapshots in the Hub's cache lie within.
    found = [
        path.parent for name in _WEIGHTS for place in ("*", "snapshots/*") for path in folder.glob(f"{place}/{name}")
    ]
    if found:
        # checkpoint-1000 comes after checkpoint-500.
        last = sorted(set(found), key=lambda path: [int(part) for part in re.findall(r"\d{1,9}", path.name)])[-_SHOWN:]
        yield f"give the folder with the weights: {' or '.join(map(str, last))}"
    if any(folder.glob("model-*-of-*.safetensors")):
        yield "copy model.safetensors.index.json there, too: it says which shards belong together"
    joined, also = f"{folder}-joined", "and copy config.json and the tokenizer's files there"
    if (folder / "zero_to_fp32.py").is_file():
        where = shlex.join(map(str, (folder / "zero_to_fp32.py", folder, joined)))
        yield f"join DeepSpeed's shards: python {where} --safe_serialization; {also}"
    if shards := sorted(path.parent for path in folder.glob("pytorch_model_fsdp*/*.distcp")):
        yield f"join FSDP's shards: accelerate merge-weights {shlex.join([str(shards[0]), joined])}; {also}"
    if said := for_inference([*folder.iterdir(), *folder.glob("onnx/*")]):
        yield said
