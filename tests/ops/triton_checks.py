# SPDX-License-Identifier: Apache-2.0
"""Triton kernels without a GPU: interpreted in a process of their own, or compiled for a GPU that
need not be here, by the very launchers that would run them."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

# The interpreter makes the bound of `range` from an array; numpy warns of that.
quiet = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Architecture: target, and the bytes of memory that the programs of a multiprocessor share.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
if "amd" not in backends:
    TARGETS.pop("gfx942")


def interpreted(file):
    """How many tests of `file` are marked so and pass, in a process whose Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreter", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"\b(\d+) passed", done.stdout)
    assert counted is not None, done.stdout
    return int(counted[1])


@dataclass
class _Elsewhere:
    """What a launch asks of a driver before it compiles."""

    target: GPUTarget
    device: int = field(default_factory=iter(range(1000, 2000)).__next__)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device  # one that no kernel was compiled for

    def get_current_stream(self, _):
        return 0


@contextmanager
def compiling(architecture, monkeypatch, folder):
    """Within the block a launch only compiles; yields a list that the compiled kernels go to."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernels.append(run(self, *args, warmup=True, **kwargs))

    with monkeypatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(driver, "_active", _Elsewhere(TARGETS[architecture][0]))
        yield kernels


def check_resources(kernel, architecture, folder):
    """Within the memory of a multiprocessor, and no register spilled."""
    assert kernel.metadata.shared <= TARGETS[architecture][1], kernel.metadata.name
    if architecture.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        spills = re.findall(r"\.vgpr_spill_count: *(\d+)", text)
    else:
        file = folder / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run(
            [tool, "-res-usage", file], capture_output=True, text=True, check=True
        )
        spills = re.findall(r"\b(?:STACK|LOCAL):(\d+)", done.stdout)
    assert spills and not any(map(int, spills)), (kernel.metadata.name, spills)
