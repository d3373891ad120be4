# SPDX-License-Identifier: Apache-2.0
"""Drive CMake; without a compiler, or with ZO_KERNELS_BUILD=0, install the pure-Python package."""

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
OLDEST_TORCH = (2, 11)  # its stable ABI makes tensors of memory with a deleter
# CMake and Ninja may be packages of this environment, which need not be activated.
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def reason_not_to_build() -> str | None:
    if os.environ.get("ZO_KERNELS_BUILD", "1") == "0":
        return "ZO_KERNELS_BUILD=0"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    for tool in ("cmake", "ninja", compiler[0]):
        if shutil.which(tool, path=SEARCH) is None:
            return f"{tool} not found"
    for module in ("torch", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return (
                f"{module} not installed (use --no-build-isolation in an environment that has it)"
            )
    torch = importlib.metadata.version("torch")
    if tuple(map(int, torch.split(".")[:2])) < OLDEST_TORCH:
        return f"torch is {torch}, older than {'.'.join(map(str, OLDEST_TORCH))}"
    return None


def builds_cuda() -> bool:
    """Where nvcc and a torch for CUDA are found; ZO_KERNELS_CUDA=0 or 1 decides otherwise."""
    from torch.version import cuda

    wanted = os.environ.get("ZO_KERNELS_CUDA", "1" if cuda else "0")
    return wanted == "1" and shutil.which("nvcc", path=SEARCH) is not None


class CMakeBuild(build_ext):
    def run(self) -> None:
        import pybind11
        from torch import __version__
        from torch.utils.cpp_extension import include_paths, library_paths

        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        work = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=SEARCH)}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DZO_TORCH_INCLUDE={';'.join(include_paths())}",
            f"-DZO_TORCH_LIB={';'.join(library_paths())}",
            f"-DZO_TORCH_VERSION={__version__}",
            f"-DZO_CUDA={'ON' if builds_cuda() else 'OFF'}",
        ]  # fmt: skip
        jobs = str(os.cpu_count() or 1)
        for command in (
            configure,
            ["cmake", "--build", str(work), "-j", jobs, "--target", "install"],
        ):
            subprocess.run(command, check=True, env=os.environ | {"PATH": SEARCH})

    def get_outputs(self) -> list[str]:
        return []


reason = reason_not_to_build()
if reason:
    print(f"zo_kernels: pure-Python install, C++ kernels are not built: {reason}", file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("zo_kernels._C", sources=[])],
    cmdclass={} if reason else {"build_ext": CMakeBuild},
)
