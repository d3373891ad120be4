# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that zo_kernels reads, in one place."""

import os
from pathlib import Path


def backend() -> str:
    """ZO_BACKEND: the backend every op takes, or "auto"; one that cannot run raises."""
    return os.environ.get("ZO_BACKEND", "auto")


def cpu_isa() -> str:
    """ZO_CPU_ISA: "scalar", "avx2", "avx512" or "auto"; one that the machine lacks raises."""
    return os.environ.get("ZO_CPU_ISA", "auto")


def cuda_cpp() -> bool:
    """ZO_CUDA_CPP=1: the update ops, and `qlinear` of few floating rows, run CUDA C++ on a GPU in
    place of Triton; raises if not built.

    Triton is the default until a row in benchmarks/results shows that C++ is faster.
    """
    return os.environ.get("ZO_CUDA_CPP", "0") == "1"


def autotune() -> bool:
    """ZO_AUTOTUNE: "1" lets Triton kernels time their tiles; see `kernels._tuning`. Default "0".

    Raises:
        ValueError: another value.
    """
    value = os.environ.get("ZO_AUTOTUNE", "0")
    if value not in ("0", "1"):
        raise ValueError(f"ZO_AUTOTUNE: it must be 0 or 1, got {value!r}; choose one")
    return value == "1"


def cache() -> Path:
    """ZO_CACHE: the folder of what is measured once for a machine; default ~/.cache/zo_kernels."""
    return Path(os.environ.get("ZO_CACHE") or Path.home() / ".cache" / "zo_kernels")
