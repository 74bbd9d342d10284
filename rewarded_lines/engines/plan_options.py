"""The options of a memory plan. Nothing else is imported here: `doctor` must start where libraries are broken."""

from __future__ import annotations

from dataclasses import dataclass

from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.options import option

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PlanOptions:
    """What a memory plan is for, where the project file does not say it.

    Attributes:
        policies: models that are merged; None: the project's, or two.
        gpus: how many share the model; None: as many as the project says, or one.
        lora: rank of the policies' adapters; 0: that of the project's, if they are adapters.
        dtype: of the engine's weights; None: the project's, or bfloat16.
        engine_share: the part of a GPU for the engine; None: the project's, or what fits.
        gpu_memory: GiB of one GPU; None: of the GPU here, or 80.
        host_memory: GiB of the host's memory; None: what is available here.
    """

    policies: int | None = option(None, "With --for: policies to merge; by default the project's, or 2.", min=1)
    gpus: int | None = option(
        None, "With --for: GPUs that share the model; by default the project's tensor_parallel_size, or 1.", min=1
    )
    lora: int = option(0, "With --for: rank of the LoRA policies; by default the project's.", min=0)
    dtype: str | None = option(
        None, "With --for: type of the weights; by default the project's, or bfloat16.", offers=DTYPES
    )
    engine_share: float | None = option(
        None, "With --for: part of a GPU for the engine; by default what fits.", min=0.01, max=1
    )
    gpu_memory: float | None = option(
        None, "With --for: GiB of one GPU; by default that of the GPU here, or 80.", min=0.01
    )
    host_memory: float | None = option(
        None, "With --for: GiB of the host's memory; by default what is available.", min=0.01
    )

    def __post_init__(self) -> None:
        """Refuse an unknown type."""
        if self.dtype is not None and self.dtype not in DTYPES:
            remedy = did_you_mean(self.dtype, DTYPES)
            raise fail(f"unknown dtype `{self.dtype}`", where="--dtype", expected=", ".join(DTYPES), remedy=remedy)
