# SPDX-License-Identifier: Apache-2.0
"""What the update ops refuse, and how they say it."""

import pytest
import torch

from zo_kernels.ops import zo_adam_, zo_sgd_
from zo_kernels.testing import assert_same_bits

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
