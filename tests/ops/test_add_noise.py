# SPDX-License-Identifier: Apache-2.0
"""`add_noise_` on every backend of this machine: bits, mathematics, layouts, errors, compile."""

import functools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from zo_kernels import _registry, rng
from zo_kernels._registry import OPS, cpp_available, use_backend
from zo_kernels.kernels._triton import triton_available
from zo_kernels.ops import add_noise_
from zo_kernels.testing import SIZES, assert_close_to_math, assert_same_bits, ran

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED, DRAWS, SCALES, DECAY = 2**63 + 5, [3, 2**40 + 1, -2], [1e-2, -0.3, 2.0], 0.9
REASONS = {"reference": lambda: None, "cpp": cpp_available}
if triton_available() is None:  # without a GPU, test_triton_add_noise.py interprets the kernel
    REASONS["triton"] = triton_available


@pytest.fixture(params=REASONS)
def backend(request):
    if (reason := REASONS[request.param]()) is not None:
        pytest.skip(f"{request.param} is {reason}")
    with use_backend(request.param), ran("add_noise_", request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend == "triton" else "cpu"


def values(n, dtype=torch.float32, device="cpu"):
    return torch.linspace(-1, 1, n).to(device, dtype)


def expected(p, stream, seed=SEED, draws=DRAWS, scales=SCALES, decay=DECAY, kind="normal"):
    """The contract word for word, in numpy."""
    total = np.float32(decay) * p.detach().cpu().float().reshape(-1).numpy()
    for draw, scale in zip(draws, scales, strict=True):
        z = rng.noise_numpy(p.numel(), seed=seed, draw=draw, stream=stream, kind=kind)
        total = total + np.float32(scale) * z
    return torch.from_numpy(total).view(p.shape).to(p.device, p.dtype)


@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(backend, device, dtype, kind):
    params = [values(n, dtype, device) for n in SIZES]
    streams = [2**32 - 1 - i for i in range(len(SIZES))]
    wanted = [expected(p, s, kind=kind) for p, s in zip(params, streams, strict=True)]
    add_noise_(params, streams, SEED, DRAWS, SCALES, DECAY, kind)
    for p, w in zip(params, wanted, strict=True):
        assert_same_bits(p, w)


@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mathematics(backend, device, dtype, kind):
    for n in SIZES:
        p = values(n, dtype, device)
        exact, by_torch = DECAY * p.double(), DECAY * p
        for draw, scale in zip(DRAWS, SCALES, strict=True):
            z = rng.noise(n, seed=SEED, draw=draw, stream=4, kind=kind, device=device)
            exact += scale * z.double()
            by_torch += scale * z.to(dtype)
        add_noise_([p], [4], SEED, DRAWS, SCALES, DECAY, kind)
        assert_close_to_math(p, by_torch, exact)


def test_subnormal_numbers_survive(backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        p = values(127, dtype, device) * 1e-39
        wanted = expected(p, 0, draws=[1], scales=[1e-40], decay=0.5)
        add_noise_([p], [0], SEED, [1], [1e-40], 0.5)
        assert_same_bits(p, wanted)
        assert p.count_nonzero() > 100


STRIDED = {
    "transposed": lambda x: x.view(10, 100).t(),
    "every second": lambda x: x[::2],
    "channels last": lambda x: x.view(5, 10, 5, 4).to(memory_format=torch.channels_last),
    "flipped axes": lambda x: x.view(2, 10, 50).permute(2, 0, 1),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_strided_parameter_takes_the_reference(dtype, layout):
    whole = values(1000, dtype)
    p = STRIDED[layout](whole)
    strides, wanted = p.stride(), expected(p, 1)
    with ran("add_noise_", "reference"):
        add_noise_([p], [1], SEED, DRAWS, SCALES, DECAY)
    assert p.stride() == strides
    assert_same_bits(p, wanted)
    if layout == "every second":
        assert_same_bits(whole[1::2], values(1000, dtype)[1::2])


def test_a_strided_parameter_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(_registry, "_logged", set())
    for _ in range(2):
        add_noise_([torch.ones(4, 6).t()], [0], 1, [0], [1.0])
    why = cpp_available() or "only for contiguous parameters"
    assert caplog.messages == [f"add_noise_: runs the reference, not cpp, which is {why}"]


def test_a_forced_backend_refuses_a_strided_parameter():
    with use_backend("triton"), pytest.raises(RuntimeError) as error:
        add_noise_([torch.ones(4, 6).t()], [0], 1, [0], [1.0])
    assert str(error.value).splitlines() == [
        "add_noise_: backend must be one that can run this call, got 'triton'; "
        "use 'auto' or one of these",
        "  reference: can run",
        f"  cpp: {cpp_available() or 'only for contiguous parameters'}",
        "  triton: runs on cuda, the tensors are on cpu",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_and_scalar_parameters(backend, device, dtype):
    whole = values(1000, dtype, device)
    params, others = [whole[3], whole[5:800]], [whole[:3], whole[4:5], whole[800:]]
    wanted, untouched = [expected(p, 1) for p in params], [x.clone() for x in others]
    add_noise_(params, [1, 1], SEED, DRAWS, SCALES, DECAY)
    for got, bits in zip(params + others, wanted + untouched, strict=True):
        assert_same_bits(got, bits)


def test_empty_tensors_and_no_draws(backend, device):
    nothing, p = torch.ones(0, 3, device=device), values(63, device=device)
    wanted = 0.5 * p
    add_noise_([nothing, p], [0, 1], 0, [], [], 0.5)
    assert_same_bits(p, wanted)


def test_empty_list():
    assert add_noise_([], [], 1, [0], [1.0]) is None


@pytest.mark.parametrize("kind", rng.KINDS)
def test_invariance(backend, device, kind, monkeypatch):
    """The bits do not depend on threads, chunks, the order of params, or how calls are split."""
    streams = list(range(len(SIZES)))

    def run(*calls):
        params = [values(n, torch.bfloat16, device) for n in SIZES]
        for indices in calls:
            add_noise_([params[i] for i in indices], indices, SEED, DRAWS, SCALES, DECAY, kind)
        return torch.cat(params)

    wanted = run(streams)
    assert_same_bits(run(streams[::-1]), wanted)
    assert_same_bits(run(streams[3:], streams[:3]), wanted)
    monkeypatch.setattr(rng, "CHUNK", 100)
    assert_same_bits(run(streams), wanted)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bits(run(streams), wanted)
    finally:
        torch.set_num_threads(threads)


def test_terms_may_come_in_several_calls_in_fp32(backend, device):
    together, apart = values(1000, device=device), values(1000, device=device)
    add_noise_([together], [0], SEED, DRAWS, SCALES)
    for draw, scale in zip(DRAWS, SCALES, strict=True):
        add_noise_([apart], [0], SEED, [draw], [scale])
    assert_same_bits(together, apart)


def test_numbers_are_taken_modulo_2_to_the_64(backend, device):
    unsigned, signed = values(127, device=device), values(127, device=device)
    add_noise_([unsigned], [0], 2**64 - 7, [2**64 - 1], [1.0])
    add_noise_([signed], [0], -7, [-1], [1.0])
    assert_same_bits(unsigned, signed)


def test_scales_and_decay_may_be_tensors(backend, device):
    numbers, tensors = values(127, device=device), values(127, device=device)
    add_noise_([numbers], [0], SEED, DRAWS, SCALES, DECAY)
    add_noise_([tensors], [0], SEED, DRAWS, torch.tensor(SCALES), torch.tensor(DECAY))
    assert_same_bits(numbers, tensors)


def test_autograd_sees_the_mutation(backend, device):
    p = values(3, device=device).requires_grad_()
    y = (p * p).sum()
    add_noise_([p], [0], 1, [0], [1.0])
    assert p.is_leaf and p.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


W = torch.ones(3)
BAD = [
    (TypeError, "params[0] must be float32, bfloat16 or float16, got torch.int8; perturb the",
     {"params": [torch.ones(3, dtype=torch.int8)]}),
    (ValueError, "params[1] must be on cpu, got meta; call once per device",
     {"params": [W, W.to("meta")], "streams": [0, 1]}),
    (ValueError, "params[0] must be without expanded axes, got (0,); pass what was expanded",
     {"params": [torch.ones(1).expand(3)]}),
    (ValueError, "params[0] must be at most 17179869184 elements, got 17179869185; split it",
     {"params": [torch.ones(1, device="meta").as_strided((2**34 + 1,), (1,))]}),
    (ValueError, "params must be distinct, got one twice; pass a tied parameter once",
     {"params": [W, W], "streams": [0, 1]}),
    (ValueError, "streams must be 1 numbers, got 2; one per parameter", {"streams": [0, 1]}),
    (ValueError, "streams[0] must be in [0, 2^32), got -1; number from 0", {"streams": [-1]}),
    (ValueError, "streams[0] must be in [0, 2^32), got 4294967296; number", {"streams": [2**32]}),
    (ValueError, "seed must be 64-bit, got 18446744073709551616; take it mod", {"seed": 2**64}),
    (ValueError, "draws must be 64-bit, got -9223372036854775809;", {"draws": [-(2**63) - 1]}),
    (ValueError, "scales must be a float32 tensor [1] on the CPU, got torch.float32 [2] on cpu;",
     {"scales": [1.0, 2.0]}),
    (ValueError, "scales must be a float32 tensor [1] on the CPU, got torch.float64 [1] on cpu;",
     {"scales": torch.ones(1, dtype=torch.float64)}),
    (ValueError, "scales must be finite, got nan; skip the step", {"scales": [float("nan")]}),
    (ValueError, "decay must be finite, got inf; skip the step", {"decay": float("inf")}),
    (ValueError, "decay must be a float32 tensor [] on the CPU, got torch.float32 [1] on cpu;",
     {"decay": torch.ones(1)}),
    (ValueError, "quanta must be a float32 tensor [1] on the CPU, got torch.float32 [2] on cpu;",
     {"quanta": [0.5, 0.5]}),
    (ValueError, "quanta must be a float32 tensor [1] on the CPU, got torch.float64 [1] on cpu;",
     {"quanta": torch.ones(1, dtype=torch.float64)}),
    (ValueError, "quanta[0] must be 0 or a power of two from 2^-126 to 2^100, got 0.75; round",
     {"quanta": [0.75]}),
    (ValueError, "quanta[0] must be 0 or a power of two from 2^-126 to 2^100, got nan; round",
     {"quanta": [float("nan")]}),
    (ValueError, "quanta[0] must be 0 where the parameter is not float32, got 0.5 for torch.bflo",
     {"params": [torch.ones(3, dtype=torch.bfloat16)], "quanta": [0.5]}),
    (ValueError, "round_draw must be 64-bit, got 18446744073709551616;", {"round_draw": 2**64}),
    (ValueError, "params[0] must be at most 34359738368 elements, got 34359738369; split it",
     {"params": [torch.ones(1, device="meta").as_strided((2**35 + 1,), (1,))], "round_draw": 1,
      "kind": "rademacher"}),
    (ValueError, "kind must be one of ('normal', 'rademacher'), got 'cauchy'; choose one",
     {"kind": "cauchy"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[m[:40] for _, m, _ in BAD])
def test_errors(error, message, change):
    good = {"params": [W], "streams": [0], "seed": 1, "draws": [0], "scales": [1.0]}
    with pytest.raises(error) as caught:
        add_noise_(**(good | change))
    assert str(caught.value).startswith(f"add_noise_: {message}")
    assert_same_bits(W, torch.ones(3))


def test_fake_makes_the_same_check():
    args = ([W], [0, 1], 1, [0], torch.ones(1), torch.tensor(1.0), "normal")
    fake_mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode, pytest.raises(ValueError, match="streams must be 1 numbers"):
        OPS["add_noise_"].overload(*args)


def test_compile_once(backend, device):
    """One graph, and none new when seed, draw, scales, decay or the storage of p change."""
    counter = CompileCounter()

    @functools.partial(torch.compile, backend=counter, fullgraph=True, dynamic=True)
    def step(p, seed, draw, scales, decay):
        add_noise_([p], [3], seed, [draw, draw + 1], scales, decay)
        return 2 * p

    for i in range(4):
        p, twin = values(127, device=device), values(127, device=device)
        seed, draw, scales, decay = 5 - 2**50 * i, 7 + 3 * i, [0.1 * i, 0.5], 1 - 0.1 * i
        doubled = step(p, seed, draw, torch.tensor(scales), torch.tensor(decay))
        add_noise_([twin], [3], seed, [draw, draw + 1], scales, decay)
        assert_same_bits(p, twin)
        assert_same_bits(doubled, 2 * twin)
        assert counter.frame_count == 1
