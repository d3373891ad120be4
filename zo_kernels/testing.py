# SPDX-License-Identifier: Apache-2.0
"""What tests of kernels share: shapes, tolerances, and how bits and backends are compared."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from zo_kernels._registry import OPS, REFERENCE, RUNS

SIZES = (1, 7, 63, 127, 1000, 4097)

# A floating kernel may err this many times as much as torch does in the same dtype, plus a floor of
# this many units in the last place of the largest result. Integers, words and noise: no tolerance.
TIMES_TORCH = 2.0
FLOOR_ULPS = {torch.float32: 2.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def assert_close_to_math(actual: Tensor, torch_result: Tensor, exact: Tensor) -> None:
    """`actual` is no worse than twice torch's own result, both judged by fp64 mathematics.

    Args:
        actual: from the kernel, fp32, bf16 or fp16.
        torch_result: what plain torch gives in the dtype of `actual`.
        exact: fp64.

    Raises:
        AssertionError: dtypes or shapes differ, a value is not finite, or the error is too large.
    """
    if actual.dtype != torch_result.dtype or not actual.shape == torch_result.shape == exact.shape:
        raise AssertionError(
            f"got {actual.dtype} {tuple(actual.shape)}, torch gives {torch_result.dtype} "
            f"{tuple(torch_result.shape)}, the mathematics {tuple(exact.shape)}"
        )
    if not actual.isfinite().all():
        raise AssertionError("a value is not finite")
    if not actual.numel():
        return
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    floor = FLOOR_ULPS[actual.dtype] * ulp
    allowed = TIMES_TORCH * (torch_result.double() - exact).abs().max().item() + floor
    error = (actual.double() - exact).abs().max().item()
    if error > allowed:
        raise AssertionError(f"largest error {error:.3e}, allowed {allowed:.3e}")


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and bytes: a nan equals itself, -0 does not equal 0.

    Raises:
        AssertionError: something differs; it says how many bytes and where the first is.
    """
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"got {actual.dtype} {tuple(actual.shape)}, "
            f"expected {expected.dtype} {tuple(expected.shape)}"
        )
    differ = _bytes(actual) != _bytes(expected)
    if differ.any():
        first = int(differ.any(dim=1).nonzero()[0])
        raise AssertionError(
            f"{int(differ.any(dim=1).sum())} of {actual.numel()} elements differ, first [{first}]: "
            f"got {actual.reshape(-1)[first].item()!r}, "
            f"expected {expected.reshape(-1)[first].item()!r}"
        )


def _bytes(x: Tensor) -> Tensor:
    return x.detach().cpu().reshape(-1, 1).contiguous().view(torch.uint8)  # [numel, itemsize]


@contextmanager
def ran(op: str, backend: str) -> Iterator[None]:
    """Every call of `op` within the block ran on `backend`, and there was one.

    Kernels written in Python count their calls. Those in C++ do not: they ran where none was
    counted, because the dispatcher has nothing else.

    Raises:
        AssertionError: another backend ran.
    """
    names = {REFERENCE, *(b.name for b in OPS[op].backends if b.kernel is not None)}
    before = {name: RUNS[op, name] for name in names}
    yield
    counted = {name for name in names if RUNS[op, name] > before[name]}
    if counted != ({backend} & names):
        raise AssertionError(f"{op}: ran on {sorted(counted) or 'C++'}, not on {backend}")
