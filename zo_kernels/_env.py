# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that zo_kernels reads, in one place."""

import os


def backend() -> str:
    """ZO_BACKEND: the backend every op takes, or "auto"; one that cannot run raises."""
    return os.environ.get("ZO_BACKEND", "auto")


def cpu_isa() -> str:
    """ZO_CPU_ISA: "scalar", "avx2", "avx512" or "auto"; one that the machine lacks raises."""
    return os.environ.get("ZO_CPU_ISA", "auto")


def cuda_cpp() -> bool:
    """ZO_CUDA_CPP=1: the update ops run CUDA C++ on a GPU in place of Triton; raises if not built.

    Triton is the default until a row in benchmarks/results shows that C++ is faster.
    """
    return os.environ.get("ZO_CUDA_CPP", "0") == "1"
