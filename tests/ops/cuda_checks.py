# SPDX-License-Identifier: Apache-2.0
"""How the code of the CUDA kernels is compiled where no GPU is: for the host, and by nvcc."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=c++17", f"-I{SOURCES}"]


def host_twin(name, folder):
    """The library of csrc/cuda/`name`.cpp."""
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no C++ compiler")
    library = folder / f"{name}.so"
    flags = [*FLAGS, "-O1", "-ffp-contract=off", "-fno-fast-math", "-Wno-unknown-pragmas"]
    command = [compiler, *flags, "-shared", "-fPIC", SOURCES / f"cuda/{name}.cpp", "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))
