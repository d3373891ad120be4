# SPDX-License-Identifier: Apache-2.0
"""Every op that is declared: opcheck, names, and the choice of a backend."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import zo_kernels.ops
from zo_kernels import _registry
from zo_kernels._registry import BACKENDS, OPS, REFERENCE, Backend, Op, use_backend
from zo_kernels.testing import ran

PACKAGE = Path(zo_kernels.__file__).parent
CASES = [
    pytest.param(op, args, id=f"{name}-{i}")
    for name, op in OPS.items()
    for i, args in enumerate(op.examples())
]


@pytest.mark.parametrize(("op", "args"), CASES)
def test_opcheck(op, args):
    """The overload that a call of the wrapper would reach."""
    opcheck(op.reference if op.choose(args) == REFERENCE else op.overload, args)


@pytest.mark.parametrize("name", OPS)
def test_opcheck_reference(name):
    """The same Python kernel stands under both overloads: one example shows that it is wired."""
    opcheck(OPS[name].reference, next(OPS[name].examples()))


def test_every_schema_of_the_namespace_is_enumerated():
    schemas = {
        schema.name.removeprefix("zo_kernels::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("zo_kernels::")
    }
    assert schemas == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_names(name):
    schema = OPS[name].overload._schema
    file = PACKAGE / "ops" / f"{name.rstrip('_')}.py"
    assert file.exists(), "an op lives in the file of its name"
    assert name in zo_kernels.ops.__all__
    assert callable(getattr(zo_kernels.ops, name))
    mutates = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    assert mutates == name.endswith("_")
    if mutates:
        assert not schema.returns
    assert OPS[name].reference._schema.overload_name == "reference"


@pytest.mark.parametrize("name", OPS)
def test_backends_are_known(name):
    for backend in OPS[name].backends:
        assert backend.name in BACKENDS
        assert (backend.kernel is None) == (backend.name == "cpp")


def test_kernel_files_are_named_after_ops():
    ops = {name.rstrip("_") for name in OPS}
    for file in (PACKAGE / "kernels").glob("[!_]*.py"):
        assert file.stem in ops


def toy(*, available=None, supports=None, device="cpu"):
    def no_device(*_):
        return torch.device("cpu")

    fast = Backend("cpp", device, lambda: available, lambda *_: supports)
    far = Backend("triton", "cuda", lambda: "not here", lambda *_: None)
    return Op("toy", lambda: "fast", lambda: "slow", no_device, lambda: iter(()), (fast, far))


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(_registry, "_logged", set())
    caplog.set_level(logging.WARNING, logger="zo_kernels")
    return caplog


def test_the_fast_kernel_runs_where_it_can(log):
    assert toy()() == "fast"
    assert not log.records


@pytest.mark.parametrize("why", [{"available": "not built"}, {"supports": "only for fp32"}])
def test_a_fallback_is_logged_once(log, why):
    op = toy(**why)
    assert [op(), op()] == ["slow", "slow"]
    (reason,) = why.values()
    assert log.messages == [f"toy: runs the reference, not cpp, which is {reason}"]


def test_a_backend_of_another_device_is_no_fallback(log):
    assert toy(device="cuda")() == "slow"
    assert not log.records


def test_forced_backend_runs_or_raises_with_all_reasons(log):
    with use_backend("cpp"):
        assert toy()() == "fast"
        with pytest.raises(RuntimeError) as error:
            toy(available="not built")()
    assert str(error.value) == (
        "toy: backend must be one that can run this call, got 'cpp'; use 'auto' or one of these\n"
        "  reference: can run\n"
        "  cpp: not built\n"
        "  triton: runs on cuda, the tensors are on cpu"
    )
    assert not log.records


def test_forced_reference(log):
    with use_backend("reference"):
        assert toy()() == "slow"
        with use_backend("auto"):
            assert toy()() == "fast"


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("ZO_BACKEND", "reference")
    assert toy()() == "slow"
    monkeypatch.setenv("ZO_BACKEND", "magic")
    with pytest.raises(ValueError, match=r"ZO_BACKEND: backend must be one of .*, got 'magic'"):
        toy()()
    monkeypatch.delenv("ZO_BACKEND")
    assert toy()() == "fast"


def test_no_gradient_no_autograd():
    """Its kernels are Python behind the dispatcher: as slow as a small layer."""

    def is_off():
        key = torch._C.DispatchKey.AutogradFunctionality
        return torch._C._dispatch_tls_is_dispatch_key_excluded(key)

    assert replace(toy(), overload=is_off)() and not is_off()


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable is None])
def test_no_gradient_flows_through_an_op_without_a_formula(name):
    for args in OPS[name].examples():
        leaves = [
            a.clone().requires_grad_()
            if isinstance(a, torch.Tensor) and a.dtype.is_floating_point
            else a
            for a in args
        ]
        results = OPS[name](*leaves)
        for result in results if isinstance(results, tuple) else (results,):
            assert result is None or not result.requires_grad


def test_unknown_backend():
    message = r"use_backend: backend must be one of .*, got 'metal'"
    with pytest.raises(ValueError, match=message), use_backend("metal"):
        pass


def test_ran_notices_another_backend():
    wrong = pytest.raises(AssertionError, match="not on cpp")
    with wrong, ran("add_noise_", "cpp"), use_backend("reference"):
        zo_kernels.ops.add_noise_([torch.ones(3)], [0], 1, [0], [1.0])
