# SPDX-License-Identifier: Apache-2.0
"""What the update ops share, on every backend: bits of the numpy twins, grids, layouts, errors."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from zo_kernels import _native, rng
from zo_kernels._registry import OPS, cpp_available, use_backend
from zo_kernels.kernels._triton import triton_available
from zo_kernels.ops import add_noise_, zo_adam_, zo_sgd_
from zo_kernels.testing import SIZES, assert_close_to_math, assert_same_bits, ran
from zo_kernels.updates_numpy import add_noise_numpy, zo_adam_numpy, zo_sgd_numpy

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
C = _native.binding()
BACKENDS = ["reference"]
if cpp_available() is None:
    BACKENDS += [f"cpp {isa}" for isa in C.cpu_isas_available()]
if triton_available() is None:
    BACKENDS.append("triton")
SEED, DRAWS, FACTORS = 2**63 + 5, [3, 2**40 + 1, 2**40 + 1, -2], [1e-2, -0.3, 0.1, 0.5]
SGD = {"lr": 0.03, "weight_decay": 0.1}
ADAM = {"lr": 0.03, "weight_decay": 0.1, "step": 3, "adam_eps": 1e-3}
# op, its numpy twin, states, options
RULES = {
    "add_noise": (add_noise_, add_noise_numpy, 0, {"decay": 0.9}),
    "sgd": (zo_sgd_, zo_sgd_numpy, None, SGD),
    "sgd sign": (zo_sgd_, zo_sgd_numpy, None, SGD | {"sign": True}),
    "sgd momentum": (zo_sgd_, zo_sgd_numpy, 1, SGD | {"momentum": 0.9}),
    "sgd momentum sign": (zo_sgd_, zo_sgd_numpy, 1, SGD | {"momentum": 0.9, "sign": True}),
    "adam": (zo_adam_, zo_adam_numpy, 2, ADAM),
}
STEPS = [name for name in RULES if name != "add_noise"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """A context that asserts that an op ran there."""
    name, _, isa = request.param.partition(" ")
    before = C.cpu_isa() if C is not None else None

    @contextlib.contextmanager
    def on(op):
        if isa:
            C.set_isa(isa)
        with use_backend(name), ran(op, name):
            yield

    on.name = name
    on.device = "cuda" if name == "triton" else "cpu"
    yield on
    if before is not None:
        C.set_isa(before)


def states_of(params, count):
    """As the op takes them: lists, or None for no buffers."""
    if count is None:
        return [None]
    moments = [[torch.linspace(-1, 1, p.numel()).view(p.shape).to(p.device) for p in params]]
    if count == 2:
        moments.append([x * x for x in moments[0]])
    return moments[:count]


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


def values(n, dtype=F32, device="cpu"):
    return torch.linspace(-1, 1, n).to(device, dtype)


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


@pytest.mark.parametrize("kind", rng.KINDS)
def test_perturb_flip_restore_gives_back_the_bits(backend, kind):
    """2000 cycles with flips by equal draws, and restoring in the call that perturbs again.

    The reference, a thousand times slower, has 100 of them.
    """
    cycles = 100 if backend.name == "reference" else 2000
    quantum, eps, n = 2.0**-20, 1e-3, 200
    p = torch.round(values(n, device=backend.device) * 2**20) * quantum
    p[n // 2] = 0.0
    wanted = p.clone()
    with backend("add_noise_"):
        call = functools.partial(add_noise_, [p], [7], SEED, kind=kind, quanta=[quantum])
        call([0], [eps])
        for draw in range(cycles):
            call([draw, draw], [-eps, -eps])
            assert not torch.equal(p, wanted)
            call([draw, draw + 1], [eps, eps])
        call([cycles], [-eps])
    assert_same_bits(p, wanted)


def test_terms_come_off_in_any_order(backend):
    p = torch.round(values(1000, device=backend.device) * 2**16) * 2.0**-16
    wanted, draws, scales = p.clone(), [4, 9, 4, 1], [0.1, -0.7, 3.0, 1e-7]
    with backend("add_noise_"):
        add_noise_([p], [0], 1, draws, scales, quanta=[2.0**-16])
        add_noise_([p], [0], 1, draws[::-1], [-s for s in scales[::-1]], quanta=[2.0**-16])
    assert_same_bits(p, wanted)


@pytest.mark.parametrize("quantum", [2.0**-126, 2.0**-30, 1.0, 2.0**100])
def test_no_draws_snap_to_the_grid(backend, quantum):
    p = (values(1001, device=backend.device) * 1000 + 0.25) * quantum
    wanted = torch.from_numpy(np.rint(p.cpu().numpy().astype(np.float64) / quantum) * quantum)
    with backend("add_noise_"):
        add_noise_([p], [0], 1, [], [], quanta=torch.tensor([quantum]))
    assert_same_bits(p, wanted.float().to(p.device) + 0.0)


def test_a_quantum_of_zero_is_off(backend):
    p, twin = (values(300, device=backend.device) for _ in range(2))
    with backend("add_noise_"):
        add_noise_([p], [0], SEED, DRAWS, FACTORS, 0.9, quanta=[0.0])
        add_noise_([twin], [0], SEED, DRAWS, FACTORS, 0.9)
    assert_same_bits(p, twin)


def test_fp32_ignores_the_draw_of_rounding_and_16_bits_the_quantum(backend):
    for dtype, option in ((F32, {"round_draw": 9}), (BF16, {"quanta": torch.ones(1)})):
        p, twin = (values(300, dtype, backend.device) for _ in range(2))
        with backend("add_noise_"):
            add_noise_([p], [0], SEED, DRAWS, FACTORS, 0.9, **option)
            add_noise_([twin], [0], SEED, DRAWS, FACTORS, 0.9)
        assert_same_bits(p, twin)


def sgd_in_fp64(p, z, states, momentum=0.0, sign=False):
    b = z if not states else momentum * states[0] + z
    return (1 - 0.03 * 0.1) * p - 0.03 * (b.sign() if sign else b), [b]


def adam_in_fp64(p, z, states):
    m, v = 0.9 * states[0] + 0.1 * z, 0.999 * states[1] + 0.001 * z * z
    change = m / (1 - 0.9**3) / ((v / (1 - 0.999**3)).sqrt() + 1e-3)
    return (1 - 0.03 * 0.1) * p - 0.03 * change, [m, v]


@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rule", STEPS)
def test_mathematics(backend, rule, dtype, kind):
    op, _, count, options = RULES[rule]
    exact_rule = adam_in_fp64 if rule == "adam" else sgd_in_fp64
    more = {k: v for k, v in options.items() if k in ("momentum", "sign")}
    for n in SIZES:
        p = values(n, dtype, backend.device)
        states = states_of([p], count)
        z = torch.zeros(n, dtype=torch.float64, device=p.device)
        for draw, factor in zip(DRAWS, FACTORS, strict=True):
            where = {"seed": SEED, "draw": draw, "stream": 4, "kind": kind, "device": p.device}
            z += factor * rng.noise(n, **where).double()
        before = [] if count is None else [s[0].double() for s in states]
        exact, kept = exact_rule(p.double(), z, before, **more)
        small = [x.to(dtype) for x in before]
        by_torch, _ = exact_rule(p, z.to(dtype), small, **more)
        with backend(op.__name__):
            op([p], *states, [4], SEED, DRAWS, FACTORS, **options, kind=kind)
        assert_close_to_math(p, by_torch, exact)
        for got, x in zip(states if count else [], kept, strict=bool(count)):
            assert_close_to_math(got[0], x.float(), x)


def test_division_of_torch_is_correctly_rounded():
    """The reference divides in fp32; by way of fp64 it would be correct for sure."""
    bits = rng.round_bits(2**20, seed=1, draw=0, stream=0) << 16
    bits |= rng.round_bits(2**20, seed=1, draw=1, stream=0)
    x = bits.int().view(F32)
    a, b = x[: 2**19], x[2**19 :]
    wanted = (a.double() / b.double()).float()
    assert torch.equal((a / b).nan_to_num(), wanted.nan_to_num())


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


W, M = torch.ones(3), torch.zeros(3)
BAD = [
    (zo_sgd_, {"buffers": [torch.zeros(4)]}, "buffers[0] must be contiguous float32 [3] on cpu, g"),
    (zo_sgd_, {"buffers": [torch.zeros(6)[::2]]}, "buffers[0] must be contiguous float32 [3] on"),
    (zo_sgd_, {"buffers": [M.bfloat16()]}, "buffers[0] must be contiguous float32 [3] on cpu, got"),
    (zo_sgd_, {"buffers": [M, M]}, "buffers must be 1 tensors, got 2; one per parameter"),
    (zo_sgd_, {"buffers": [W]}, "params must be distinct, got one twice"),
    (zo_sgd_, {"buffers": None, "momentum": 0.9}, "momentum must be 0, got 0.9 without buffers; g"),
    (zo_sgd_, {"lr": float("nan")}, "hyper must be finite, got nan; skip the step"),
    (zo_sgd_, {"coeffs": [1.0, 2.0]}, "coeffs must be a float32 tensor [1] on the CPU, got"),
    (zo_adam_, {"exp_avg_sqs": []}, "exp_avg_sqs must be 1 tensors, got 0; one per parameter"),
    (zo_adam_, {"exp_avgs": [torch.zeros(1, 3)]}, "exp_avgs[0] must be contiguous float32 [3] on"),
    (zo_adam_, {"coeffs": [float("inf")]}, "coeffs must be finite, got inf; skip the step"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "change", "message"), BAD, ids=[m[:40] for *_, m in BAD])
def test_errors(op, change, message):
    good = {"params": [W], "streams": [0], "seed": 1, "draws": [0], "coeffs": [1.0], "lr": 0.1}
    if op is zo_sgd_:
        good |= {"buffers": [M]}
    else:
        good |= {"exp_avgs": [M], "exp_avg_sqs": [torch.zeros(3)], "step": 1}
    with pytest.raises(ValueError) as caught:
        op(**(good | change))
    assert str(caught.value).startswith(f"{op.__name__}: {message}")
    assert_same_bits(W, torch.ones(3))


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
