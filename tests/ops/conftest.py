# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of kernels."""

import numpy as np
import pytest
import torch


@pytest.fixture
def rounded(monkeypatch):
    """Triton 3.6's interpreter cuts fp32 to bf16 where a GPU rounds to the nearest, ties to even,
    and multiplies the bits of bf16 as if they were integers.

    That the GPU rounds is in the tests that compile ahead of time: cvt.rn.bf16.f32.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    cut = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, x, dtype):
        if dtype.scalar != tl.bfloat16:
            return cut(self, x, dtype)
        bits = torch.from_numpy(x.data.copy()).bfloat16().view(torch.int16).numpy()
        return TensorHandle(bits.view("uint16"), tl.bfloat16)

    dot = InterpreterBuilder.create_dot

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, wide(a), wide(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", create_fp_trunc)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
