# SPDX-License-Identifier: Apache-2.0
"""The compiled parts of this installation, if it has them."""

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

from zo_kernels import _env

NOT_BUILT = "not built at install time (no compiler or CMake, or ZO_KERNELS_BUILD=0)"
_TORCH_LIBRARY = Path(__file__).parent / "_torch.so"
_CUDA_LIBRARY = Path(__file__).parent / "_cuda.so"


@cache
def binding() -> ModuleType | None:
    """The torch-free module `zo_kernels._C`, or None where it was not built.

    Raises:
        ValueError: ZO_CPU_ISA names an instruction set that is unknown or that the CPU lacks.
    """
    try:
        module = importlib.import_module("zo_kernels._C")
    except ModuleNotFoundError:
        return None
    if (isa := _env.cpu_isa()) != "auto":
        module.set_isa(isa)
    return module


def empty_cache() -> int:
    """Give memory that outputs of the CPU kernels had, and that no tensor holds, to the system.

    Up to 128 MiB are kept for the next outputs otherwise. For between two uses of another size,
    such as drawing pictures and training; `torch.cuda.empty_cache` is the same on a GPU.

    Returns:
        How many bytes.
    """
    module = binding()
    return 0 if module is None else int(module.trim_pool())


@cache
def load_ops() -> str | None:
    """Load the C++ kernels into torch's dispatcher; None, or the reason why there are none."""
    import torch

    if binding() is None or not _TORCH_LIBRARY.exists():
        return NOT_BUILT
    try:
        torch.ops.load_library(str(_TORCH_LIBRARY))
    except OSError as error:
        return f"{_TORCH_LIBRARY.name} does not load into torch {torch.__version__}: {error}"
    return None


@cache
def load_cuda() -> str | None:
    """Load the CUDA C++ kernels; None, or the reason why there are none."""
    import torch

    if not _CUDA_LIBRARY.exists():
        return "not built at install time (no nvcc, a torch without CUDA, or ZO_KERNELS_CUDA=0)"
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        return f"{_CUDA_LIBRARY.name} does not load into torch {torch.__version__}: {error}"
    return None


def require_cuda() -> None:
    """Load the CUDA C++ kernels, as `_env.cuda_cpp` asks.

    Raises:
        RuntimeError: they were not built.
    """
    if (why := load_cuda()) is not None:
        raise RuntimeError(f"ZO_CUDA_CPP: the CUDA C++ kernels must be there, got {why}; unset it")
