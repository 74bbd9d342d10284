"""How wide the vectors are that compiled kernels use: for a process to decide, before it imports them."""

from __future__ import annotations


def use_wide_vectors() -> None:
    """Have all that numba compiles in this process use the widest vectors there are.

    LLVM keeps to 256 bits on processors that have 512, for the sake of code that uses them now and then; our loops do
    nothing else, and take a third less time. It is a setting of numba's for the whole process, so only one of our own
    should call this, before the kernels are imported. The user's own setting stands.
    """
    import llvmlite.binding
    import numba

    features = llvmlite.binding.get_host_cpu_features()
    if numba.config.CPU_FEATURES is None and features.get("avx512f"):
        numba.config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"
