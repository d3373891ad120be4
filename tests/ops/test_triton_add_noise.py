# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel without a GPU: interpreted on the CPU, and compiled ahead of time."""

import os
import re
import subprocess
import sys

import pytest
import torch

from zo_kernels import rng
from zo_kernels.ops.add_noise import DTYPES, add_noise_ref
from zo_kernels.testing import SIZES, assert_same_bits

triton = pytest.importorskip("triton")
kernel = pytest.importorskip("zo_kernels.kernels.add_noise")

# The interpreter makes the bound of `range` from an array; numpy warns of that.
quiet = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


@pytest.fixture
def rounded(monkeypatch):
    """Triton 3.6's interpreter cuts fp32 to bf16 where a GPU rounds to the nearest, ties to even.

    That the GPU does is in `test_ahead_of_time`: cvt.rn.bf16.f32.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    cut = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, x, dtype):
        if dtype.scalar != tl.bfloat16:
            return cut(self, x, dtype)
        bits = torch.from_numpy(x.data.copy()).bfloat16().view(torch.int16).numpy()
        return TensorHandle(bits.view("uint16"), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", create_fp_trunc)


@quiet
@pytest.mark.interpreter
@pytest.mark.parametrize("draws", [[0], [2**40 + 3, -7]], ids=len)
@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(dtype, kind, draws, rounded):
    params = [torch.linspace(-1, 1, n).to(dtype) for n in SIZES]
    wanted = [p.clone() for p in params]
    streams = [0, 1, 2**31, 2**32 - 1, 5, 6]
    scales = torch.tensor([1e-3, -2.0][: len(draws)])
    arguments = (streams, -5, draws, scales, torch.tensor(0.9), kind)
    kernel.add_noise__triton(params, *arguments)
    add_noise_ref(wanted, *arguments)
    for p, w in zip(params, wanted, strict=True):
        assert_same_bits(p, w)


@quiet
@pytest.mark.interpreter
@pytest.mark.parametrize("kind", rng.KINDS)
def test_misaligned_and_empty(kind):
    def views():
        x = torch.linspace(-1, 1, 600)
        return [x[1:101], x[103:600], x[:0]]

    params, wanted = views(), views()
    arguments = ([0, 1, 2], 7, [1], torch.tensor([0.5]), torch.tensor(1.0), kind)
    kernel.add_noise__triton(params, *arguments)
    add_noise_ref(wanted, *arguments)
    for p, w in zip(params, wanted, strict=True):
        assert_same_bits(p, w)


@pytest.mark.slow
def test_interpreter():
    """Runs the tests above, in a process whose Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreter", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b14 passed", done.stdout), done.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kind", "dtype"), [("normal", "bf16"), ("rademacher", "fp32")])
def test_ahead_of_time(kind, dtype, capability, tmp_path, monkeypatch):
    """Compiles for a GPU that need not be here; every fp32 operation is correctly rounded."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = ASTSource(
        kernel._add_noise__kernel,
        signature={
            "p_ptr": f"*{dtype}",
            "draws_ptr": "*i64",
            "scales_ptr": "*fp32",
            "n": "i64",
            "seed": "i64",
            "stream": "i64",
            "terms": "i32",
            "decay": "fp32",
            "NORMAL": "constexpr",
            "BLOCKS": "constexpr",
        },
        constexprs={"NORMAL": kind == "normal", "BLOCKS": kernel.BLOCKS[kind]},
    )
    options = {"enable_fp_fusion": kernel.FUSED, "num_warps": kernel.WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    arithmetic = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp|sqrt|rsqrt)\.[\w.]*f32", ptx))
    wanted = {"mul.rn.f32", "add.rn.f32"}  # without .rn, ptxas might fuse them
    if kind == "normal":
        wanted |= {"sub.rn.f32", "sqrt.rn.f32"}
    assert arithmetic == wanted
    assert ("cvt.rn.bf16.f32" in ptx) == (dtype == "bf16")


def test_a_new_number_is_no_new_kernel():
    """What changes with the step is neither constexpr nor specialized upon."""
    fixed = {p.name for p in kernel._add_noise__kernel.params if p.is_constexpr}
    assert fixed == {"NORMAL", "BLOCKS"}
    for p in kernel._add_noise__kernel.params:
        if p.name in ("n", "seed", "stream", "terms"):
            assert p.do_not_specialize
            assert p.annotation_type in ("i64", "i32")
