# SPDX-License-Identifier: Apache-2.0
"""For every test: memory that nothing was written to reads as NaN, or as 0xAA for integers."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores: a thread each, or they wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _poisoned(allocate):
    def run(*args, **kwargs):
        out = allocate(*args, **kwargs)
        # Traced and meta tensors have no memory, sparse ones not yet.
        traced = torch.compiler.is_compiling() or type(out) is not torch.Tensor
        if not (traced or out.is_meta or out.layout != torch.strided):
            _poison(out.detach())
        return out

    return run


def _poison(x):
    if x.dtype in INTEGERS:
        signed = x.dtype != torch.uint8
        x.fill_(int.from_bytes(b"\xaa" * x.itemsize, "little", signed=signed))
    elif x.is_floating_point() or x.is_complex():
        x.fill_(float("nan"))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


def pytest_collection_modifyitems(config, items):
    """Triton decides at import whether to interpret, so those tests take a process of their own.

    `tests/ops/test_triton_add_noise.py::test_interpreter` starts it.
    """
    chosen, others = [], []
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        marked = item.get_closest_marker("interpreter") is not None
        (chosen if marked == interpreted else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen
