"""Loads a reward model into transformers with its head: stored under another name, in an adapter, or made by own code.

transformers' class with a head `score` computes what TRL's, OpenRLHF's and LLaMA-Factory's classes compute:

    r(x, y) = (w·h + b − mean) / deviation,     h the last hidden state of the last token
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapters import ADAPTER_FILE, PREFIX
from rewarded_lines.engines.tokenizers import attention_of
from rewarded_lines.errors import UserError, fail, listed
from rewarded_lines.rewards.classifier_backends import cannot_load, no_classifier, without_load_report
from rewarded_lines.rewards.reward_checkpoints import OWN_HEADS, WRAPPER, RewardCheckpoint, shapes_in

_CLASSIFIER, _ANY = "AutoModelForSequenceClassification", "AutoModel"
TRUST = "set `trust_remote_code: true` in the reward to run it; read it first"
# Doc strings for decorators, which transformers 5 dropped and older code still imports.
_DROPPED = re.compile(r"cannot import name '(\w+_(?:INPUTS|START)_DOCSTRING)' from '(transformers\.[\w.]+)'")
# Of adapters of language models: no reward reads the head for tokens.
_UNREAD = ("lm_head", "embed_out")
# The layer of a head that has a row for each class.
_LAST_LAYER = re.compile(r"(^|\.)(score|classifier|out_proj|logits_proj)(\.modules_to_save(\.[^.]+)?)?\.weight$")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+\.)?")
_SHOWN = 6


@dataclass
class LoadedModel:
    """A model in transformers with its head.

    Attributes:
        model: the module.
        names: of the columns that `read` returns.
        read: returns columns (texts, classes) of an output.
        pad: the padding token at whose border the head reads; None if it reads the last token, whatever it is.
        own_code: True if the code of the folder runs.
    """

    model: Any
    names: list[str]
    read: Callable[[Any], Any]
    pad: int | None
    own_code: bool


def load_config(where: str, checkpoint: RewardCheckpoint, trust: bool) -> Any:
    """Return the config of the whole model; own code runs only with `trust`, and nobody is asked."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.base, trust_remote_code=trust)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        remedy = TRUST if checkpoint.own_code and not trust else ""
        raise cannot_load(where, checkpoint.base, error, remedy) from error
    # Some have the same tensors as a classifier of texts.
    if any(name.endswith("ForTokenClassification") for name in config.architectures or ()):
        raise _reads_tokens(where, f"{checkpoint.base}: {config.architectures[0]}")
    return config


def runs_own_code(checkpoint: RewardCheckpoint, trust: bool) -> bool:
    """Return whether the folder's own code makes the model: `AutoModel` may also stand for a body without a head."""
    own = checkpoint.own_code
    whole = str(own.get(_ANY)).rpartition(".")[2] in checkpoint.architectures or not checkpoint.has_head
    return trust and (_CLASSIFIER in own or (_ANY in own and whole))


def load_model(where: str, checkpoint: RewardCheckpoint, dtype: Any, trust: bool) -> LoadedModel:
    """Return the model with its head.

    Raises:
        UserError: it cannot be loaded, or weights of the head are missing.
    """
    config = load_config(where, checkpoint, trust)
    pad = None if checkpoint.reads_last else config.get_text_config().pad_token_id
    if runs_own_code(checkpoint, trust):
        if checkpoint.adapter:
            raise fail(
                "an adapter of a model with code of its own",
                where=where,
                got=checkpoint.reference,
                remedy="fold it into its base with that code, and name the folder that comes out",
            )
        return LoadedModel(_load_own(where, checkpoint, dtype, config), [], _columns_of, pad, own_code=True)
    code = checkpoint.own_code and not trust
    model, missing, unread = _load_whole(where, checkpoint, dtype, config, TRUST if code else "")
    if checkpoint.head:
        missing -= _set_head(where, checkpoint, model)
    if checkpoint.adapter:
        missing -= _attach_adapter(where, checkpoint, model)
    if missing:
        # transformers would initialize the head at random, and its scores would be noise.
        raise _no_head(where, checkpoint, missing, unread, f"the model has code of its own; {TRUST}" if code else "")
    left = [name for name in unread if name.removeprefix(WRAPPER).startswith(OWN_HEADS)]
    if left and not checkpoint.head:
        raise _reads_tokens(where, f"{checkpoint.reference} with {listed(left, _SHOWN)}, which no class for texts has")

    def read(output: Any) -> Any:
        # First to the CPU: some devices have no float64.
        logits = output.logits.cpu().double()
        return (logits - checkpoint.mean) / checkpoint.deviation if checkpoint.normalized else logits

    labels = model.config.id2label
    return LoadedModel(model.eval(), [str(labels[at]) for at in sorted(labels)], read, pad, own_code=False)


def names_of_output(where: str, model: Any, output: Any) -> list[str]:
    """Return the names of the columns of an output of own code; refuse an output without rewards."""
    columns = _columns_of(output)
    if columns is None or columns.ndim != 2:
        kinds = list(output.keys()) if hasattr(output, "keys") else [type(output).__name__]
        raise fail(
            "the model's own code returns no rewards of whole texts",
            where=where,
            expected="an output with `rewards`, `logits` or `score`, a row for each text",
            got=", ".join(kinds) if columns is None else f"shape {tuple(columns.shape)}",
        )
    gated = getattr(output, "rewards", None) is not None and getattr(output, "score", None) is not None
    count = columns.shape[1] - gated
    labels = getattr(model.config, "id2label", None) or {}
    labels = labels if len(labels) == count else {at: f"LABEL_{at}" for at in range(count)}
    named = [str(labels[at]) for at in sorted(labels)]
    return [*named, "score"] if gated else named


def _columns_of(output: Any) -> Any:
    """Return the rewards in an output of own code, shape (texts, columns); None without rewards.

    ArmoRM returns `rewards`, one for each objective, and `score`, which its gate makes of them: it is the last column.
    """
    import torch

    rewards, score = getattr(output, "rewards", None), getattr(output, "score", None)
    if rewards is not None and score is not None and rewards.ndim == 2:
        return torch.cat([rewards.cpu().double(), score.cpu().double().reshape(len(rewards), 1)], dim=1)
    logits = getattr(output, "logits", None)
    found = next((one for one in (rewards, logits, score, output) if isinstance(one, torch.Tensor)), None)
    if found is None:
        return None
    return (found[:, None] if found.ndim == 1 else found).cpu().double()


def _load_whole(
    where: str, checkpoint: RewardCheckpoint, dtype: Any, config: Any, remedy: str
) -> tuple[Any, set[str], list[str]]:
    """Return the classifier, names of weights that it lacks, and names of stored tensors that it does not read."""
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    if (rows := head_rows(checkpoint)) is not None:
        config.num_labels = rows
    wrapped = any(name.startswith(WRAPPER) for name in checkpoint.tensors)
    try:
        # What is missing is an error below.
        with without_load_report():
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                checkpoint.base,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                **attention_of(config),
                **({"key_mapping": {rf"^{re.escape(WRAPPER)}": ""}} if wrapped else {}),
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise cannot_load(where, checkpoint.base, error, remedy) from error
    return model, set(loading["missing_keys"]), sorted(loading["unexpected_keys"])


def _load_own(where: str, checkpoint: RewardCheckpoint, dtype: Any, config: Any) -> Any:
    """Return a model that the folder's own code makes; the user's word for it is known."""
    import transformers

    kind = getattr(transformers, _CLASSIFIER if _CLASSIFIER in checkpoint.own_code else _ANY)
    while True:
        try:
            model, loading = kind.from_pretrained(
                checkpoint.base, dtype=dtype, output_loading_info=True, trust_remote_code=True, **attention_of(config)
            )
            break
        except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
            if not _give_doc_string(error):
                remedy = "its own code may need another version of transformers"
                raise cannot_load(where, checkpoint.base, error, remedy) from error
    if loading["missing_keys"]:
        raise _no_head(where, checkpoint, set(loading["missing_keys"]))
    return model.eval()


def head_rows(checkpoint: RewardCheckpoint) -> int | None:
    """Return the number of classes of the stored head; None if it is not known here."""
    if checkpoint.head:
        return int(_stored_head(checkpoint)["weight"].shape[0])
    shapes = shapes_in(checkpoint.adapter / ADAPTER_FILE) if checkpoint.adapter else checkpoint.own_head
    return next((shape[0] for name, shape in shapes.items() if _LAST_LAYER.search(name)), None)


def _stored_head(checkpoint: RewardCheckpoint) -> dict[str, Any]:
    """Return weight and perhaps bias of a head under a name of its own."""
    from safetensors import safe_open

    found = {}
    for kind, file in checkpoint.head_files.items():
        with safe_open(file, "pt") as stored:
            names = {name.removeprefix(WRAPPER): name for name in stored.keys()}  # noqa: SIM118 - no dict
            found[kind] = stored.get_tensor(names[f"{checkpoint.head}.{kind}"])
    return found


def _set_head(where: str, checkpoint: RewardCheckpoint, model: Any) -> set[str]:
    """Put the stored head into the model; return the names of weights that are no longer missing."""
    import torch

    head, stored = getattr(model, "score", None), _stored_head(checkpoint)
    weight = stored["weight"]
    if not isinstance(head, torch.nn.Linear) or head.weight.shape != weight.shape:
        raise fail(
            f"the head `{checkpoint.head}` does not fit the model",
            where=where,
            expected=f"a decoder and a head of shape {tuple(head.weight.shape)}" if head else "a decoder",
            got=f"{type(model).__name__} and a head of shape {tuple(weight.shape)} in {checkpoint.reference}",
        )
    for kind, value in stored.items():
        setattr(head, kind, torch.nn.Parameter(value.to(head.weight.dtype), requires_grad=False))
    return {"score.weight"}


def _attach_adapter(where: str, checkpoint: RewardCheckpoint, model: Any) -> set[str]:
    """Put the adapter's layers and head into the model, as PEFT computes with them; return names that it brings."""
    from peft import PeftConfig, PeftModel

    folder = str(checkpoint.adapter)
    try:
        config: Any = PeftConfig.from_pretrained(folder)
        if str(config.peft_type.value) != "LORA":
            raise ValueError(f"an adapter of type {config.peft_type.value}, not LORA")
        config.inference_mode = True
        loading = PeftModel(model, config).load_adapter(folder, "default")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise cannot_load(where, checkpoint.reference, error) from error
    strange = [name for name in loading.unexpected_keys if not any(head in name for head in _UNREAD)]
    if strange or loading.missing_keys:
        raise fail(
            "the adapter does not fit its base",
            where=where,
            expected=f"an adapter of {checkpoint.base}",
            got=f"{checkpoint.reference}: {', '.join([*strange, *loading.missing_keys][:_SHOWN])}",
        )
    return {_SAVED.sub(".", name.removeprefix(PREFIX)) for name in shapes_in(Path(folder, ADAPTER_FILE))}


def _no_head(
    where: str, checkpoint: RewardCheckpoint, missing: set[str], unread: Sequence[str] = (), remedy: str = ""
) -> UserError:
    """Return the error for a model without a head, with what it holds in place of one."""
    others = [name for name in unread if not any(head in name for head in _UNREAD)]
    beside = f"; it holds {listed(others, _SHOWN)}" if others else ""
    return no_classifier(where, f"{checkpoint.reference} without {', '.join(sorted(missing))}{beside}", remedy)


def _reads_tokens(where: str, got: str) -> UserError:
    """Return the error for a head that scores tokens, as process reward models do."""
    expected = "a model with one score for a text, …ForSequenceClassification"
    remedy = "make one number of the steps' scores in a Python function: `function: rewards.py:NAME`"
    return fail("the head scores tokens or steps, not texts", where=where, expected=expected, got=got, remedy=remedy)


def _give_doc_string(error: Exception) -> bool:
    """Give transformers a doc string that older code of a model imports; return whether that was what it lacks."""
    found = _DROPPED.search(str(error))
    if found is None or hasattr(module := importlib.import_module(found[2]), found[1]):
        return False
    setattr(module, found[1], "")
    return True
