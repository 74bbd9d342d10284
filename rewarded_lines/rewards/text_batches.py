"""Batches of texts whose shape does not depend on the other texts, so that a score keeps its bits.

A sum of floats depends on its order, the order on the kernel, and the kernel on the shape of the batch. So a
text's length alone decides the shape: its width is the length rounded up, and each width has a fixed number of
rows, for a like number of tokens. Fillers take the empty rows. Models also switch kernels if the attention mask hides
nothing, so every batch has some padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rewarded_lines.out_of_memory import NO_MEMORY, no_room, ran_out, tell
from rewarded_lines.reward_settings import RewardSpec

TOKENS_PER_ROW = 16
"""Texts up to this length have `batch_size` rows."""
# On a GPU, 8,192 tokens: small models then wait less for their kernels to start, and fillers cost little.
_GPU_BATCH_SIZE = 512
_FEWEST_ROWS = 2
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """One call of the model: `rows` times `width` tokens, and the places of its texts."""

    members: tuple[int, ...]
    rows: int
    width: int


def make_batches(
    lengths: Sequence[int],
    batch_size: int,
    longest: int | None = None,
    apart: Sequence[int] = (),
    limits: Mapping[int, int] | None = None,
) -> Iterator[Batch]:
    """Yield batches of all texts, short texts first; equal lengths always get the same rows and width.

    Args:
        lengths: tokens of each text, at least 1.
        batch_size: rows for texts up to 16 tokens; longer texts get fewer rows, for a like number of tokens.
        longest: the model's positions, or None without a limit.
        apart: a number for each text; texts with different numbers share no batch.
        limits: the most tokens of a batch, from a width on.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        alike[width_of(lengths[index], longest), apart[index] if apart else 0].append(index)
    for (width, _), members in alike.items():
        tokens = [TOKENS_PER_ROW * batch_size, *(most for start, most in (limits or {}).items() if width >= start)]
        # A power of two: kernels split other numbers of rows unevenly.
        wanted = max(min(batch_size, min(tokens) // width), 1)
        rows = max(1 << (wanted.bit_length() - 1), _FEWEST_ROWS)
        # The longest texts may have no padding, so a filler provides it.
        room = rows - 1 if width == longest else rows
        for start in range(0, len(members), room):
            yield Batch(tuple(members[start : start + room]), rows, width)


def width_of(length: int, longest: int | None = None) -> int:
    """Return the tokens of a row for a text; `longest`: see `make_batches`."""
    step = 8 if length < 64 else 16 if length < 128 else 32
    width = length + step - length % step
    return width if longest is None or length > longest else min(width, longest)


def batch_size_on(device: str, spec: RewardSpec) -> int:
    """Return the `batch_size` of `make_batches`: the declared one, or the device's."""
    if spec.batch_tokens is not None:
        return max(spec.batch_tokens // TOKENS_PER_ROW, 1)
    declared = device.startswith("cpu") or "batch_size" in spec.model_fields_set
    return spec.batch_size if declared else _GPU_BATCH_SIZE


class TextBatches:
    """Runs a model on texts; where memory runs out, on fewer rows for texts of that width or more from then on."""

    def __init__(self, where: str, device: str, spec: RewardSpec) -> None:
        """Begin with the shapes that the device and the reward decide; `where` names the reward in messages."""
        self._where, self._batch_size = where, batch_size_on(device, spec)
        self._instead = " in place of `batch_size:`" if "batch_size" in spec.model_fields_set else ""
        self._limits: dict[int, int] = {}

    def run(
        self,
        lengths: Sequence[int],
        work: Callable[[Batch], Sequence[Result]],
        longest: int | None = None,
        apart: Sequence[int] = (),
    ) -> list[Result]:
        """Return what `work` makes of each text; it gets a batch and returns a result for each member.

        Raises:
            UserError: not even the fewest rows fit.
        """
        found: dict[int, Result] = {}
        while len(found) < len(lengths):
            for batch in make_batches(lengths, self._batch_size, longest, apart, self._limits):
                if found.keys() >= {*batch.members}:
                    continue
                try:
                    found |= zip(batch.members, work(batch), strict=True)
                except NO_MEMORY as error:
                    if not ran_out(error):
                        raise
                    self._shrink(batch, error)
                    # Texts of equal length have equal shapes within a call.
                    found = {at: one for at, one in found.items() if width_of(lengths[at], longest) < batch.width}
                    break
        return [found[at] for at in range(len(lengths))]

    def _shrink(self, batch: Batch, error: BaseException) -> None:
        what = f"{batch.rows} texts of {batch.width} tokens"
        if batch.rows <= _FEWEST_ROWS:
            raise no_room(self._where, f"not even {what} fit", error) from error
        first = not self._limits
        tokens = self._limits[batch.width] = batch.rows // 2 * batch.width
        if first:
            tell(
                f"{self._where}: memory ran out with {what} in a batch; such texts go in smaller batches from now on, "
                f"and no score is lost. Their last bits may differ from earlier ones; `batch_tokens: {tokens}` in the "
                f"reward{self._instead} gives every text that is scored from then on the same batches"
            )
