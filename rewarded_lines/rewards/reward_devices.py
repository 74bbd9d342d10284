"""Where a reward model runs: the device that a declaration names, and how much memory is left there."""

from __future__ import annotations

import os
from pathlib import Path

from rewarded_lines.errors import fail

_MEMORY_INFO = Path("/proc/meminfo")


def find_device(device: str, where: str) -> str:
    """Return the device that `device` means here.

    Args:
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1" or another name that torch knows.
        where: the reward, for messages.

    Raises:
        UserError: it is not the name of a device, or that device is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    expected = "auto, cpu, cuda or cuda:N"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise fail("not a device", where=where, expected=expected, got=repr(device)) from error
    if kind == "meta":
        raise fail("no scores come from there", where=where, expected=expected, got=repr(device))
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        raise fail(
            "no such device here",
            where=where,
            expected=f"cpu or one of {count} GPUs, cuda:0 to cuda:{count - 1}" if count else "cpu: there is no GPU",
            got=repr(device),
            remedy="change `device:` of the reward, or the --device that it takes without one",
        ) from error
    return device


def available_memory(device: str) -> int:
    """Return how many bytes could be taken on a device without swapping; a GPU's also if torch holds them unused."""
    import torch

    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if _MEMORY_INFO.is_file():
        for line in _MEMORY_INFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
