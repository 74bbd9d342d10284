"""Out of memory: how the error is known, and batches that shrink until they fit, so that no run is lost."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from rewarded_lines.errors import UserError, fail

# What torch writes where it raises no class of its own: a CPU, the driver of a GPU, cuBLAS. Then what vLLM writes.
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "No available memory for the cache blocks",
    "larger than the available KV cache memory",
    "is less than desired GPU memory utilization",
    "is less than desired CPU memory utilization",
    "is less than requested memory for kv",
)
NO_MEMORY = (RuntimeError, MemoryError)
"""The classes of errors that `ran_out` looks at; `torch.OutOfMemoryError` is a RuntimeError."""
_REMEDY = (
    "leave it more memory: `--reward-memory`, or a smaller `gpu_memory_utilization` of the engine, `--offload always`, "
    "`dtype: bfloat16` in a reward, or `device: cpu`"
)
Item = TypeVar("Item")
Result = TypeVar("Result")


def ran_out(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; if so, free what the failed work held."""
    import torch

    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not known and not any(sign in str(error) for sign in _SIGNS):
        return False
    # Tracebacks keep the variables of the failed functions, and these their tensors.
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__context__
    empty_cache()
    return True


def empty_cache() -> None:
    """Give memory of freed tensors back to the GPU, where other engines can take it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def no_room(where: str, what: str, error: BaseException) -> UserError:
    """Return the error for work that does not fit into memory, however small its batches."""
    got = (str(error).strip() or type(error).__name__).splitlines()[0]
    return fail(f"out of memory: {what}", where=where, got=got, remedy=_REMEDY)


def tell(fact: str) -> None:
    """Write a fact about memory to the log, which is stderr by default."""
    logging.getLogger("rewarded_lines").warning(fact)


class FittingBatches:
    """Batches of rows. Where memory runs out, they have half as many rows from then on.

    Attributes:
        most: rows of a batch.
    """

    def __init__(self, where: str, most: int) -> None:
        """Begin with `most` rows; `where` names the work in messages."""
        self._where, self.most, self._told = where, most, False

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """Return what `work` makes of each item; it gets them in batches.

        Raises:
            UserError: a single row does not fit.
        """
        done: list[Result] = []
        while len(done) < len(items):
            batch = items[len(done) : len(done) + self.most]
            try:
                done += work(batch)
            except NO_MEMORY as error:
                if not ran_out(error):
                    raise
                self._shrink(len(batch), error)
        return done

    def _shrink(self, rows: int, error: BaseException) -> None:
        if rows == 1:
            raise no_room(self._where, "a single row does not fit", error) from error
        self.most = rows // 2
        if not self._told:
            tell(f"{self._where}: memory ran out with {rows} rows in a batch; batches get smaller, and nothing is lost")
        self._told = True
