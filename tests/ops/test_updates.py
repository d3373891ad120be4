# SPDX-License-Identifier: Apache-2.0
"""What the update ops share, on every backend: bits of the numpy twins, layouts, compilation."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from update_rules import (
    BF16,
    DRAWS,
    F16,
    F32,
    FACTORS,
    RULES,
    SEED,
    STEPS,
    backend,
    states_of,
    values,
)

from zo_kernels import rng
from zo_kernels._registry import OPS
from zo_kernels.ops import zo_sgd_
from zo_kernels.testing import SIZES, assert_same_bits

__all__ = ["backend"]


def array(x):
    """A row-major copy; bf16 as its bits."""
    x = x.detach().cpu().contiguous().clone()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == BF16 else x.numpy()


def tensor(x, like):
    x = torch.from_numpy(x.view(np.int16)).view(BF16) if like.dtype == BF16 else torch.from_numpy(x)
    return x.to(like.device)


def by_numpy(rule, params, streams, kind, quanta, round_draw):
    _, twin, count, options = RULES[rule]
    states = states_of(params, count)
    arrays = [array(p) for p in params]
    kept = [None if s is None else [array(x) for x in s] for s in states]
    for i, (p, stream) in enumerate(zip(arrays, streams, strict=True)):
        more = {"kind": kind, "round_draw": round_draw}
        more["quantum"] = quanta[i] if quanta else 0.0
        own = [s if s is None else s[i] for s in kept]
        twin(p, *own, stream, SEED, DRAWS, FACTORS, **options, **more)
    news = [tensor(p, like) for p, like in zip(arrays, params, strict=True)]
    return news, [[] if s is None else [torch.from_numpy(x) for x in s] for s in kept]


def check(rule, params, kind, quanta=None, round_draw=None, on=None):
    op, _, count, options = RULES[rule]
    streams = [2**32 - 1 - i for i in range(len(params))]
    wanted, kept = by_numpy(rule, params, streams, kind, quanta, round_draw)
    states = states_of(params, count)
    more = options | {"kind": kind, "quanta": quanta, "round_draw": round_draw}
    with on(op.__name__) if on else contextlib.nullcontext():
        op(params, *states, streams, SEED, DRAWS, FACTORS, **more)
    for p, w in zip(params, wanted, strict=True):
        assert_same_bits(p, w)
    for got, bits in zip(states, kept, strict=True):
        for x, y in zip(got or [], bits, strict=True):
            assert_same_bits(x, y.to(x.device))


WAYS = [(F32, False), (F32, True), (BF16, False), (BF16, True), (F16, False), (F16, True)]


@pytest.mark.parametrize(("dtype", "special"), WAYS)
@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_bits_of_the_numpy_twin(backend, rule, kind, dtype, special):
    """`special`: on a grid, or rounded at random."""
    whole = [values(n + 1, dtype, backend.device) for n in (*SIZES, 40_000)]
    params = [x[1:] for x in whole]  # misaligned
    quanta = [2.0**-i for i in range(8, 15)] if special and dtype == F32 else None
    round_draw = 2**50 if special and dtype != F32 else None
    check(rule, params, kind, quanta, round_draw, backend)
    for x in whole:
        assert x[0] == -1


@pytest.mark.parametrize("rule", STEPS)
def test_a_strided_parameter(rule):
    for dtype in (F32, BF16):
        p = values(600, dtype).view(20, 30).t()
        check(rule, [p], "normal", on=None)
        assert p.stride() == (1, 30)


def test_the_sign_of_zero_and_nan_is_zero(backend):
    p = values(6, device=backend.device)
    b = torch.tensor([0.0, -0.0, float("nan"), 1e-45, -1e-45, float("inf")], device=p.device)
    wanted = p - torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0, 1.0], device=p.device)
    with backend("zo_sgd_"):
        zo_sgd_([p], [b], [0], 1, [], [], lr=1.0, momentum=1.0, sign=True)
    assert_same_bits(p, wanted)


def test_empty_tensors_and_lists(backend):
    p = torch.ones(0, 3, device=backend.device)
    for rule in STEPS:
        op, _, count, options = RULES[rule]
        with backend(op.__name__):
            op([p], *states_of([p], count), [0], 1, [0], [1.0], **options)
        op([], *[[] for _ in range(count or 1)], [], 1, [0], [1.0], **options)


@pytest.mark.parametrize("rule", ["add_noise", "sgd momentum", "adam"])
def test_autograd_sees_every_mutation(rule):
    op, _, count, options = RULES[rule]
    p = values(3).requires_grad_()
    states = states_of([p.detach()], count)
    tensors = [x for s in ([p], *states) for x in s]
    before = [x._version for x in tensors]
    op([p], *states, [0], 1, [0], [1.0], **options)
    assert all(x._version > b for x, b in zip(tensors, before, strict=True))


def test_compile_once(backend):
    """One graph for every step of Adam, with random rounding."""
    counter, device = CompileCounter(), backend.device

    @functools.partial(torch.compile, backend=counter, fullgraph=True, dynamic=True)
    def step(p, m, v, draw, coeffs, hyper):
        args = ([p], [m], [v], [3], 5, [draw, draw], coeffs, hyper, "normal", None, draw + 1)
        OPS["zo_adam_"](*args)
        return 2 * p

    for i in range(3):
        p, m, v = values(127, BF16, device), *(x[0] for x in states_of([values(127)], 2))
        twins = [x.to(device).clone() for x in (p, m, v)]
        p, m, v = (x.clone() for x in twins)
        coeffs, hyper = torch.tensor([0.1 * i, 0.5]), torch.linspace(0.1, 0.5, 7) * (i + 1)
        with backend("zo_adam_"):
            doubled = step(p, m, v, 7 + 3 * i, coeffs, hyper)
            lists = [[x] for x in twins]
            numbers = ([3], 5, [7 + 3 * i] * 2, coeffs, hyper, "normal", None, 8 + 3 * i)
            OPS["zo_adam_"](*lists, *numbers)
        for got, twin in zip((p, m, v), twins, strict=True):
            assert_same_bits(got, twin)
        assert_same_bits(doubled, 2 * p)
        assert counter.frame_count == 1
