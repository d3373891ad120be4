# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of all update ops without a GPU: interpreted, and compiled ahead of time."""

import copy
import importlib
import re

import pytest
import torch
from torch import Tensor

from zo_kernels import rng
from zo_kernels._registry import OPS
from zo_kernels.ops._updates import DTYPES
from zo_kernels.testing import SIZES, assert_same_bits

triton = pytest.importorskip("triton")
shared = pytest.importorskip("zo_kernels.kernels._updates")

NAMES = ("add_noise_", "zo_sgd_", "zo_adam_")
checks = pytest.importorskip("triton_checks")


def module_of(name):
    return importlib.import_module(f"zo_kernels.kernels.{name.rstrip('_')}")


def both(name, args):
    """The kernel and the reference on copies of `args`: every tensor has the same bits."""
    wanted, got = copy.deepcopy(args), copy.deepcopy(args)
    OPS[name].reference(*wanted)
    getattr(module_of(name), f"{name}_triton")(*got)
    for xs, ys in zip(got, wanted, strict=True):
        if isinstance(xs, list) and xs and isinstance(xs[0], Tensor):
            for x, y in zip(xs, ys, strict=True):
                assert_same_bits(x, y)


@checks.quiet
@pytest.mark.interpreter
@pytest.mark.parametrize("name", NAMES)
def test_examples(name, rounded):
    for args in OPS[name].examples():
        if all(p.is_contiguous() for p in args[0]):
            both(name, args)


@checks.quiet
@pytest.mark.interpreter
@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_bits(name, dtype, kind, rounded):
    """On a grid or rounded at random, with states, misaligned, some draws equal."""
    params = [torch.linspace(-1, 1, n + 1).to(dtype)[1:] for n in SIZES]
    states = [[torch.linspace(0.1, 2, n) for n in SIZES] for _ in range(2)]
    factors, hyper = torch.tensor([1e-3, -2.0, 0.5]), torch.linspace(0.9, 0.1, 7)
    terms = ([0, 1, 2**31, 2**32 - 1, 5, 6], -5, [2**40 + 3, 2**40 + 3, -7], factors)
    grid = torch.tensor([0.0] + [2.0**-i for i in range(10, 15)])
    rest = (kind, grid, -(2**40))
    args = {
        "add_noise_": (params, *terms, torch.tensor(0.9), *rest),
        "zo_sgd_": (params, states[0], *terms, hyper[:3].clone(), True, *rest),
        "zo_adam_": (params, *states, *terms, hyper, *rest),
    }
    both(name, args[name])


@checks.quiet
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_random_rounding_of_every_half(dtype, rounded):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    if dtype == torch.bfloat16:  # the interpreter reads subnormal ones as zero, a GPU does not
        finite = finite[finite.abs() >= torch.finfo(dtype).tiny]
    for factor in (1 / 3, 2.0**-13, 1.7):
        args = ([finite], [1], 5, [], torch.ones(0), torch.tensor(factor), "rademacher", None, 77)
        both("add_noise_", args)


@checks.quiet
@pytest.mark.interpreter
@pytest.mark.parametrize("kind", rng.KINDS)
def test_perturb_flip_restore_gives_back_the_bits(kind):
    p = torch.round(torch.linspace(-1, 1, 200) * 2**20) * 2.0**-20
    wanted = p.clone()

    def call(draws, scales):
        numbers = torch.tensor(scales), torch.tensor(1.0)
        grid = torch.tensor([2.0**-20])
        module_of("add_noise_").add_noise__triton([p], [7], 1, draws, *numbers, kind, grid)

    call([0], [1e-3])
    for draw in range(20):  # every cycle is an interpreted launch; test_updates.py has 2000
        call([draw, draw], [-1e-3, -1e-3])
        call([draw, draw + 1], [1e-3, 1e-3])
    call([20], [-1e-3])
    assert_same_bits(p, wanted)


@pytest.mark.slow
def test_interpreter():
    """Runs the tests above, in a process whose Triton interprets."""
    assert checks.interpreted(__file__) == 25


# What the compiled kernels may use, beside mul and add: the rest would be a rounding that differs.
ROOTS = {"add_noise_": set(), "zo_sgd_": set(), "zo_adam_": {"sqrt.rn.f32", "div.rn.f32"}}
WAYS = [
    ("normal", "bf16", "nearest"),
    ("normal", "fp16", "random"),
    ("rademacher", "bf16", "random"),
    ("rademacher", "fp32", "grid"),
    ("normal", "fp32", "nearest"),
]


def arguments(name, kind, dtype, way):
    """Those of a call on one tensor that lies as an allocator puts it, with every state."""
    whole = torch.ones(4096, dtype=DTYPES[("fp32", "bf16", "fp16").index(dtype)])
    params, terms = [whole], ([0], 1, [0], torch.ones(1))
    moments = [[torch.ones(4096)] for _ in range(2)]
    rest = (kind, torch.ones(1) if way == "grid" else None, 5 if way == "random" else None)
    return {
        "add_noise_": (params, *terms, torch.tensor(1.0), *rest),
        "zo_sgd_": (params, moments[0], *terms, torch.ones(3), kind == "normal", *rest),
        "zo_adam_": (params, *moments, *terms, torch.ones(7), *rest),
    }[name]


def targets():
    for architecture in checks.TARGETS:
        for kind, dtype, way in WAYS if architecture == "sm_90" else WAYS[1:3]:
            yield architecture, kind, dtype, way


@pytest.mark.parametrize(("architecture", "kind", "dtype", "way"), list(targets()))
@pytest.mark.parametrize("name", NAMES)
def test_ahead_of_time(name, architecture, kind, dtype, way, tmp_path, monkeypatch):
    """Compiles for a GPU that need not be here; every fp32 operation is correctly rounded."""
    launcher = getattr(module_of(name), f"{name}_triton")
    with checks.compiling(architecture, monkeypatch, tmp_path) as kernels:
        launcher(*arguments(name, kind, dtype, way))
    (kernel,) = kernels
    checks.check_resources(kernel, architecture, tmp_path)
    if architecture.startswith("gfx"):
        return
    ptx = kernel.asm["ptx"]
    assert f".target {architecture}" in ptx
    arithmetic = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp|sqrt|rsqrt)\.[\w.]*f32", ptx))
    wanted = {"mul.rn.f32", "add.rn.f32"} | ROOTS[name]  # without .rn, ptxas might fuse them
    if kind == "normal":
        wanted |= {"sqrt.rn.f32"}
    assert wanted <= arithmetic <= wanted | {"sub.rn.f32"}
    if dtype == "bf16":
        assert "cvt.rn.bf16.f32" in ptx or "cvt.rn.bf16x2.f32" in ptx
    # Whole tiles have no mask, and addresses out of a table are known to be aligned.
    assert re.search(r"\n\s+st\.global\.(v\d|b32)", ptx)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_number_is_no_new_kernel(name):
    """What changes with the step is neither constexpr nor specialized upon."""
    kernel = getattr(module_of(name), f"_{name}_kernel")
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    kinds = {"DTYPE", "ALIGNED", "NORMAL", "GRID", "ROUNDS", "BLOCKS"}
    assert fixed - {"SIGN", "BUFFER"} == kinds
    for p in kernel.params:
        if p.name in shared.RUNTIME:
            assert p.do_not_specialize
            assert p.annotation_type in ("i64", "i32")
        elif not p.is_constexpr:
            assert p.name in shared.UNALIGNED and p.do_not_specialize_on_alignment
