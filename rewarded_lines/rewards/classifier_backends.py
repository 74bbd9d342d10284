"""What both backends of a classifier share: its device and dtype, and the errors of loading it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rewarded_lines.errors import UserError, fail
from rewarded_lines.reward_settings import RewardSpec

_DTYPES = ("float32", "bfloat16", "float16")
# The token ids of several texts, or their token types.
Ids = Sequence[Sequence[int]]


def cannot_load(where: str, reference: str, error: Exception, remedy: str = "") -> UserError:
    """Return the error for a model that a library failed to load."""
    return fail("the model cannot be loaded", where=where, got=f"{reference}: {error}", remedy=remedy)


def no_classifier(where: str, got: str, remedy: str = "") -> UserError:
    """Return the error for a model without a classification head."""
    return fail(
        "not a classifier: weights of the head are missing",
        where=where,
        expected="a sequence classification checkpoint",
        got=got,
        remedy=remedy or "train one with recipes/reward.py",
    )


@contextmanager
def without_load_report() -> Iterator[None]:
    """Keep transformers from warning of a head that it does not find, where the caller puts one there."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def bytes_held(model: Any) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def with_dtype(where: str, spec: RewardSpec, config: Any) -> RewardSpec:
    """Return the settings with the dtype that the config names, where they say "auto"."""
    if spec.dtype != "auto":
        return spec
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    dtype = str(named).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise fail(
            "the config does not say in which dtype the model computes",
            where=f"{where}, dtype: auto",
            expected=f"`dtype` {', '.join(_DTYPES)} in its config.json",
            got=dtype,
            remedy="declare one of them, such as `dtype: bfloat16`",
        )
    return spec.model_copy(update={"dtype": dtype})


def find_device(device: str, where: str) -> str:
    """Return the torch device, a GPU with its number ("auto": a GPU if possible); refuse devices that are missing."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = "auto, cpu, cuda or cuda:N"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise fail("not a device", where=where, expected=expected, got=repr(device)) from error
    if kind == "meta":
        raise fail("no scores come from this device", where=where, expected=expected, got=repr(device))
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        gpus = f"cpu or one of {count} GPUs, cuda:0 to cuda:{count - 1}"
        raise fail(
            "no such device here",
            where=where,
            expected=gpus if count else "cpu: there is no GPU",
            got=repr(device),
            remedy="change the reward's `device:`; if it has none, change --device",
        ) from error
    # "cuda" and "cuda:0" are one device, also where models are counted.
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
