"""The device that computes a merge: whether it is there, and which one is faster for a job."""

from __future__ import annotations

from importlib.util import find_spec

from rewarded_lines.errors import fail
from rewarded_lines.extras import require
from rewarded_lines.kernels.thread_pool import cores
from rewarded_lines.progress import Progress

_DEVICES = "cpu, auto, cuda or cuda:1"
# Seconds for loading torch and starting CUDA.
_START = 8.0
# For a value of each policy, in one thread of a compiled rule.
_NANOSECONDS = 2.5
# Bytes of a GPU for its context and the blocks of all threads.
_ROOM = 3 << 30


def faster_device(seconds: float, free: int) -> tuple[str, str]:
    """Return "cpu" or "cuda", and why.

    The compiled loops of linear methods keep up with the files, so a GPU has nothing to win there. Other rules may take
    longer than the files; then a GPU pays if they also take longer than its start.

    Args:
        seconds: that the CPU would compute by rules that are not linear.
        free: bytes of the GPU; 0 without a GPU that torch can use.
    """
    if not seconds:
        return "cpu", "its compiled loops are as fast as the files"
    if seconds <= _START:
        return "cpu", f"about {seconds:.1f} s of arithmetic, less than the start of a GPU"
    why = f"about {seconds:.0f} s of arithmetic on the CPU"
    if not free:
        return "cpu", f"{why}, but there is no GPU that torch can use"
    if free < _ROOM:
        return "cpu", f"{why}, but the GPU has only {free / 1e9:.1f} of {_ROOM / 1e9:.1f} GB free"
    return "cuda", why


def settled_device(values: int, policies: int, progress: Progress) -> str:
    """Return the faster device of this machine, and tell why; torch is loaded only if it matters.

    Args:
        values: that such rules merge, in all outputs.
        policies: the number of residuals that they join.
        progress: gets the reason.
    """
    seconds, free = values * policies * _NANOSECONDS * 1e-9 / cores(), 0
    if seconds > _START and find_spec("torch"):
        import torch

        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    device, why = faster_device(seconds, free)
    progress.tell(f"--device auto: {device}, {why}")
    return device


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or cannot use."""
    # The CPU needs no torch, which takes longer to load than a small merge.
    if device in ("cpu", "auto"):
        return
    require("eval", f"--device {device}", "torch")
    import torch

    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise fail("not a device", where="--device", expected=_DEVICES, got=device) from error
    if kind.type not in ("cpu", "cuda"):
        raise fail("not a device for merges", where="--device", expected=_DEVICES, got=device)
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise fail("no GPU that torch can use", where="--device", got=device, remedy="use --device cpu")
