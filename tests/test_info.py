# SPDX-License-Identifier: Apache-2.0
"""The report of what is installed, as data and as text."""

import subprocess
import sys
from types import SimpleNamespace

import numpy
import torch

import zo_kernels
from zo_kernels import _native, info
from zo_kernels._registry import OPS, cpp_available
from zo_kernels.kernels._triton import triton_available


def test_versions():
    found = info.versions()
    assert found["zo_kernels"] == zo_kernels.__version__
    assert found["numpy"] == numpy.__version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) == {"zo_kernels", "torch", "triton", "numpy"}


def test_a_package_that_is_missing():
    assert info._version("no-such-package-of-zo-kernels") == "not installed"


def test_matrix_has_every_op_and_backend():
    cells = {(c.op, c.backend): c for c in info.matrix()}
    wanted = {(name, "reference") for name in OPS}
    wanted |= {(name, b.name) for name, op in OPS.items() for b in op.backends}
    assert set(cells) == wanted
    assert all(cells[name, "reference"].reason is None for name in OPS)
    assert cells["add_noise_", "cpp"] == info.Cell("add_noise_", "cpp", "cpu", cpp_available())
    assert cells["add_noise_", "triton"].reason == triton_available()


def test_native_without_the_library(monkeypatch):
    monkeypatch.setattr(_native, "binding", lambda: None)
    monkeypatch.setenv("ZO_CPU_ISA", "scalar")
    assert info.native() == {"C++": _native.NOT_BUILT, "ZO_CPU_ISA": "scalar"}


def test_native_with_the_library(monkeypatch):
    module = SimpleNamespace(
        build_info=lambda: {"compiler": "some 1.2"},
        cpu_isa=lambda: "avx2",
        cpu_isas_available=lambda: ["scalar", "avx2"],
    )
    monkeypatch.setattr(_native, "binding", lambda: module)
    assert info.native() == {
        "compiler": "some 1.2",
        "isa in use": "avx2",
        "isas available": "scalar, avx2",
        "ZO_CPU_ISA": "auto",
    }


def test_report_without_torch(monkeypatch):
    monkeypatch.setattr(info, "_version", lambda _: "not installed")
    assert info.report().endswith("\n\nops need torch")


def test_command():
    command = [sys.executable, "-W", "error", "-m", "zo_kernels.info"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == info.report() + "\n"
    for name in OPS:
        assert f"\n{name} " in done.stdout
