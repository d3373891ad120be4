# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of kernels."""

import pytest
import torch


@pytest.fixture
def rounded(monkeypatch):
    """Triton 3.6's interpreter cuts fp32 to bf16 where a GPU rounds to the nearest, ties to even.

    That the GPU does is in the tests that compile ahead of time: cvt.rn.bf16.f32.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    cut = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, x, dtype):
        if dtype.scalar != tl.bfloat16:
            return cut(self, x, dtype)
        bits = torch.from_numpy(x.data.copy()).bfloat16().view(torch.int16).numpy()
        return TensorHandle(bits.view("uint16"), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", create_fp_trunc)
