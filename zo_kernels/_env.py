# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that zo_kernels reads, in one place."""

import os


def backend() -> str:
    """ZO_BACKEND: the backend every op takes, or "auto"; one that cannot run raises."""
    return os.environ.get("ZO_BACKEND", "auto")


def cpu_isa() -> str:
    """ZO_CPU_ISA: "scalar", "avx2", "avx512" or "auto"; one that the machine lacks raises."""
    return os.environ.get("ZO_CPU_ISA", "auto")
