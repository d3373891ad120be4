# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that zo_kernels reads, in one place."""

import os
from pathlib import Path
from typing import Any

# Where `os.environ` keeps its variables, and under which key. Every call of an op asks for the
# backend, and `os.environ.get` of what is not set takes as long as all checks of a tensor.
_variables: Any = getattr(os.environ, "_data", os.environ)
_BACKEND = os.environ.encodekey("ZO_BACKEND") if _variables is not os.environ else "ZO_BACKEND"


def backend() -> str:
    """ZO_BACKEND: the backend every op takes, or "auto"; one that cannot run raises."""
    return os.environ["ZO_BACKEND"] if _BACKEND in _variables else "auto"


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
