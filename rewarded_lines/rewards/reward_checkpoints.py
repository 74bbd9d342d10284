"""What a reward model's folder or Hub id holds: a whole model, a LoRA adapter of one, a head under a name of its own.

    whole       transformers' ForSequenceClassification
    adapter     PEFT: adapter_config.json, the head among its tensors or in value_head.safetensors
    v_head      TRL up to 1.12: `v_head.summary.weight` and `.bias`; LLaMA-Factory: the same in value_head.safetensors
    value_head  OpenRLHF: `value_head.weight` or what the config calls `value_head_prefix`; mean and std in the config
    score_head  Safe RLHF: `score_head.weight`, with or without a bias; not if `do_normalize` is on

Nothing is unpickled: files that end in `.bin` are refused with the command that converts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG
from rewarded_lines.checkpoints.adapters import ADAPTER_FILE, is_adapter
from rewarded_lines.checkpoints.hashing import files_hash, model_hash
from rewarded_lines.checkpoints.reader import INDEX_FILE, SINGLE_FILE, read_json_object
from rewarded_lines.errors import UserError, fail
from rewarded_lines.references import looks_local

HEAD_FILE = "value_head.safetensors"
# Heads that read the last token, by the name before `.weight`: of TRL, OpenRLHF, Safe RLHF and others.
_HEADS = ("v_head.summary", "value_head", "v_head", "reward_head", "rm_head", "score_head")
# DeepSpeed saves TRL's wrapper with this before the names.
WRAPPER = "pretrained_model."
OWN_HEADS = ("score.", "classifier.", "classification_head.", "sequence_summary.", "logits_proj.")
_TOKENIZER = ("tokenizer*", "*.model", "chat_template*", "vocab*", "merges.txt", "special_tokens_map.json")
_CODE = ("*.py",)
_CONVERT = (
    'python -c "import glob, torch; from safetensors.torch import save_file; '
    "found = [torch.load(file, weights_only=True) for file in sorted(glob.glob({source!r}))]; "
    "save_file({{name: value.clone() for one in found for name, value in one.items()}}, {to!r}, {{'format': 'pt'}})\""
)


@dataclass(frozen=True)
class RewardCheckpoint:
    """What is stored of a reward model.

    Attributes:
        reference: the folder or Hub id that the reward names.
        base: where config and whole weights are: the adapter's base, otherwise `reference`.
        adapter: the folder of the adapter, if it is one.
        tensors: the file of each stored tensor by name, without those of an adapter.
        head: the head's name without `.weight`; "" for one that transformers knows.
        head_files: the files of such a head's weight and bias.
        reads_last: True if the head reads the last token, also where it is the padding token.
        mean: subtracted from the head's value.
        deviation: the value is divided by it.
        own_code: the classes in the folder's own code, by transformers' auto class.
        architectures: the classes that saved it.
    """

    reference: str
    base: str
    adapter: Path | None
    tensors: Mapping[str, str]
    head: str
    head_files: Mapping[str, Path]
    reads_last: bool
    mean: float
    deviation: float
    own_code: Mapping[str, Any]
    architectures: tuple[str, ...]

    @property
    def has_head(self) -> bool:
        """Whether a head is stored under a name that is known here."""
        return bool(self.head) or any(name.startswith(OWN_HEADS) for name in self.tensors)

    @property
    def own_head(self) -> dict[str, list[int]]:
        """Shapes of the stored tensors of a head that transformers knows."""
        files = {name: file for name, file in self.tensors.items() if name.removeprefix(WRAPPER).startswith(OWN_HEADS)}
        found = {file: shapes_in(path) for file in set(files.values()) if (path := _file(self.base, file))}
        return {name: found[file][name] for name, file in files.items() if name in found.get(file, ())}

    @property
    def normalized(self) -> bool:
        """Whether mean and deviation change the head's value."""
        return (self.mean, self.deviation) != (0.0, 1.0)

    @property
    def form(self) -> str:
        """What it is beside a whole classifier, for messages; "" if nothing."""
        kinds = {"a LoRA adapter": self.adapter, f"a model with the head `{self.head}`": self.head}
        return " and ".join(kind for kind, there in kinds.items() if there)


def open_reward_checkpoint(where: str, reference: str) -> RewardCheckpoint:
    """Return what `reference`, a folder or a Hub id, holds.

    Raises:
        UserError: nothing is there, the base of an adapter is missing, or weights are pickled.
    """
    adapter = _adapter_of(where, reference)
    base = _base_of(where, adapter) if adapter else reference
    config_file = _file(base, "config.json")
    if config_file is None and looks_local(base):
        raise fail(
            "no model there",
            where=where,
            expected="a folder with config.json and weights",
            got=base,
            remedy="train it with recipes/reward.py, or name a Hub id",
        )
    config = read_json_object(config_file) if config_file else {}
    tensors = _tensor_files(where, base)
    beside = _file(reference, HEAD_FILE)
    if beside is None:
        for name in ("value_head.bin", *(["pytorch_model.bin"] if adapter else [])):
            _refuse_pickle(where, reference, name, HEAD_FILE)
    stored = dict.fromkeys(shapes_in(beside), beside.name) if beside else tensors
    head = _head_in(stored, config)
    if config.get("do_normalize"):
        raise fail(
            "the model normalizes its scores by statistics of its training, which are not read",
            where=where,
            got=f"`do_normalize: true` in the config of {base}",
            remedy="use a copy with `do_normalize: false`: mean and deviation do not change which response is better",
        )
    normalized = bool(config.get("normalize_reward"))
    return RewardCheckpoint(
        reference=reference,
        base=base,
        adapter=adapter,
        tensors=tensors,
        head=head,
        head_files=_head_files(head, stored, reference if beside else base) if head else {},
        reads_last=bool(head) or "normalize_reward" in config or "value_head_prefix" in config,
        mean=_number(config.get("mean", 0.0)) if normalized else 0.0,
        deviation=_number(config.get("std", 1.0)) if normalized else 1.0,
        own_code=config.get("auto_map") or {},
        architectures=tuple(config.get("architectures") or ()),
    )


def tokenizer_of(checkpoint: RewardCheckpoint) -> str:
    """Return where the tokenizer is: an adapter may leave it to its base."""
    if checkpoint.adapter and not _file(checkpoint.reference, "tokenizer_config.json"):
        return checkpoint.base
    return checkpoint.reference


def fingerprint_of(checkpoint: RewardCheckpoint, own_code: bool, tokenizer: str | None) -> str:
    """Return a hash of all that decides the model's output; `tokenizer` is another folder's or Hub id's."""
    parts = [content_hash(reference) for reference in dict.fromkeys([checkpoint.reference, checkpoint.base])]
    if own_code and Path(checkpoint.base).is_dir():
        parts.append(files_hash(Path(checkpoint.base), _CODE))
    if tokenizer:
        parts.append(files_hash(Path(tokenizer), _TOKENIZER) if Path(tokenizer).is_dir() else content_hash(tokenizer))
    return ":".join(parts)


def content_hash(reference: str) -> str:
    """Return the hash of a folder, or the commit of a Hub model, which names its cache folder."""
    if Path(reference).is_dir():
        return model_hash(Path(reference))
    found = _file(reference, "config.json") or _file(reference, ADAPTER_CONFIG)
    found = found or _file(reference, "tokenizer_config.json")
    return found.parent.name if found else ""


def _adapter_of(where: str, reference: str) -> Path | None:
    """Return the folder of an adapter; None for a whole model."""
    settings = _file(reference, ADAPTER_CONFIG)
    if settings is None or not is_adapter(settings.parent):
        return None
    if _file(reference, ADAPTER_FILE) is None:
        _refuse_pickle(where, reference, "adapter_model.bin", ADAPTER_FILE)
        raise fail("an adapter without weights", where=where, expected=ADAPTER_FILE, got=reference)
    return settings.parent


def _base_of(where: str, adapter: Path) -> str:
    """Return the base of an adapter: a folder relative to the adapter or to here, or a Hub id."""
    base = str(read_json_object(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    for folder in (adapter / base, Path(base).expanduser()):
        if base and (folder / "config.json").is_file():
            return str(folder.resolve())
    if not base or looks_local(base):
        raise fail(
            "the base of the adapter is not there",
            where=where,
            expected="a model's folder, relative to the adapter or to here, or a Hub id",
            got=repr(base),
            remedy=f"write it as `base_model_name_or_path` into {adapter / ADAPTER_CONFIG}",
        )
    return base


def _head_in(names: Iterable[str], config: Mapping[str, Any]) -> str:
    """Return the name of a head that transformers does not know, or ""."""
    own = {name.removeprefix(WRAPPER) for name in names}
    declared = config.get("value_head_prefix")
    heads = [declared] if declared else [] if any(name.startswith(OWN_HEADS) for name in own) else _HEADS
    return next((str(head) for head in heads if f"{head}.weight" in own), "")


def _head_files(head: str, stored: Mapping[str, str], reference: str) -> dict[str, Path]:
    """Return the files of a head's weight and bias."""
    names = {name.removeprefix(WRAPPER): file for name, file in stored.items()}
    files = {
        kind: _file(reference, names[f"{head}.{kind}"]) for kind in ("weight", "bias") if f"{head}.{kind}" in names
    }
    return {kind: file for kind, file in files.items() if file}


def _tensor_files(where: str, base: str) -> dict[str, str]:
    """Return the file of each tensor of a model; none if a Hub model has no safetensors."""
    if single := _file(base, SINGLE_FILE):
        return dict.fromkeys(shapes_in(single), SINGLE_FILE)
    if index := _file(base, INDEX_FILE):
        return dict(read_json_object(index).get("weight_map") or {})
    if Path(base).is_dir():
        _refuse_pickle(where, base, "pytorch_model*.bin", SINGLE_FILE)
    return {}


def shapes_in(file: Path) -> dict[str, list[int]]:
    """Return the shapes in a safetensors file by name; none if it is damaged, which loading tells."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as stored:
            return {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118 - no dict
    except SafetensorError:
        return {}


def _file(reference: str, name: str) -> Path | None:
    """Return the path of a folder's or Hub model's file; None without it."""
    if Path(reference).is_dir() or looks_local(reference):
        path = Path(reference, name)
        return path if path.is_file() else None
    from transformers.utils import cached_file

    calm = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found = cached_file(reference, name, **calm, _raise_exceptions_for_gated_repo=False)
    except OSError:
        # No such model, which loading it tells.
        return None
    return Path(found) if found else None


def _refuse_pickle(where: str, reference: str, pattern: str, to: str) -> None:
    """Refuse pickled weights, if there are some, with the command that converts them."""
    if Path(reference).is_dir():
        files = sorted(Path(reference).glob(pattern))
    else:
        files = [found] if (found := _file(reference, pattern)) else []
    if files:
        raise pickled(where, files[0].parent / pattern, files[0].parent / to)


def pickled(where: str, source: Path, to: Path) -> UserError:
    """Return the error for pickled weights."""
    return fail(
        "the weights are pickled, and a pickle can run code",
        where=where,
        expected=to.name,
        got=str(source),
        remedy=_CONVERT.format(source=str(source), to=str(to)),
    )


def _number(value: Any) -> float:
    """Return a number that a config holds, alone or in a list."""
    return float(value[0] if isinstance(value, list) else value)
