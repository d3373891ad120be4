# SPDX-License-Identifier: Apache-2.0
"""What qlinear and qconv2d refuse, and in which words."""

import re

import pytest
import torch

from zo_kernels.ops import qconv2d, qlinear
from zo_kernels.packing import pack

X, W, SCALE = torch.ones(5, 6), pack(torch.zeros(4, 6, dtype=torch.int8)), torch.ones(4)
INT8, META = torch.zeros(5, 6, dtype=torch.int8), {"device": "meta"}
NO_GROUPS = "scale must be of groups that divide the 6 input channels, got"
LINEAR = [
    (TypeError, "x must be float32, bfloat16, float16, float64 or int8, got", {"x": X.int()}),
    (ValueError, "x must be [..., K], got shape []", {"x": torch.tensor(1.0)}),
    (ValueError, "x must be [..., K], got shape [5, 0]", {"x": X[:, :0]}),
    (
        ValueError,
        "qweight must be [1, 3, 16, 4], 4 rows of 1 * 9 codes of 8 bits, got shape [1, 2, 16, 4]",
        {"x": torch.ones(5, 9)},
    ),
    (ValueError, "qweight must be [1, 1, 16, 4], 4 rows of 1 * 6 codes of 4 bits", {"bits": 4}),
    (ValueError, "qweight must be [2, 2, 16, 4], 17 rows", {"scale": torch.ones(17)}),
    (ValueError, "qweight must be [1, 2, 16, 4], 4 rows", {"qweight": W.view(2, 1, 16, 4)}),
    (ValueError, "qweight must be [1, 2, 16, 4], 4 rows", {"qweight": W.view(-1)}),
    (TypeError, "qweight must be uint8, got torch.int8; give", {"qweight": W.char()}),
    (
        ValueError,
        "qweight must be contiguous, got strides",
        {"qweight": torch.stack([W, W], -1)[..., 0]},
    ),
    (TypeError, "qweight must be uint8, got torch.float32; give", {"qweight": torch.ones(4, 6)}),
    (ValueError, "scale must be [N] or [N, groups], got shape []", {"scale": torch.tensor(1.0)}),
    (ValueError, "scale must be [N] or [N, groups], got shape [0]", {"scale": SCALE[:0]}),
    (ValueError, "scale must be [N] or [N, groups], got", {"scale": torch.ones(4, 1, 1)}),
    (ValueError, f"{NO_GROUPS} 4 groups for 1 * 6", {"scale": torch.ones(4, 4)}),
    (ValueError, f"{NO_GROUPS} 12 groups for 1 * 6", {"scale": torch.ones(4, 12)}),
    (TypeError, "scale must be float32, got torch.bfloat16", {"scale": SCALE.bfloat16()}),
    (TypeError, "zero_point must be int8, got torch.float32", {"zero_point": torch.zeros(4)}),
    (ValueError, "zero_point must be [4], got shape [3]", {"zero_point": INT8[0, :3]}),
    (
        ValueError,
        "zero_point must be [4, 2], got shape [4]",
        {"scale": torch.ones(4, 2), "zero_point": INT8[0, :4]},
    ),
    (ValueError, "bias must be [4], got shape [3]", {"bias": torch.ones(3)}),
    (TypeError, "bias must be float32, bfloat16, float16 or float64", {"bias": SCALE.int()}),
    (ValueError, "bits must be one of (8, 4), got 2; choose one", {"bits": 2}),
    (ValueError, "act_bits must be one of (16, 8), got 4; choose one", {"act_bits": 4}),
    (ValueError, "activation must be one of ('none', 'silu', 'gelu')", {"activation": "relu"}),
    (ValueError, "out_dtype must be one of (None, ", {"out_dtype": torch.int8}),
    (ValueError, "x_scale must be given where x is int8, else not", {"x": INT8}),
    (ValueError, "x_scale must be given where x is int8, else", {"x_scale": torch.ones(5)}),
    (ValueError, "x_scale must be [5], got shape [6]", {"x": INT8, "x_scale": torch.ones(6)}),
    (
        TypeError,
        "x_scale must be float32, got torch.float64",
        {"x": INT8, "x_scale": torch.ones(5).double()},
    ),
    (
        ValueError,
        "in_scale must be None where x is int8",
        {"x": INT8, "x_scale": torch.ones(5), "in_scale": torch.ones(6)},
    ),
    (ValueError, "in_scale must be [6], got shape [4]", {"in_scale": SCALE}),
    (TypeError, "in_scale must be float32, got torch.float16", {"in_scale": X[0].half()}),
    (ValueError, "residual must be [5, 4], got shape [4]", {"residual": SCALE}),
    (TypeError, "residual must be float32, bfloat16", {"residual": INT8[:, :4]}),
    *(
        (ValueError, f"{name} must be on the device of x (cpu), got meta", {name: value})
        for name, value in {
            "qweight": W.to("meta"),
            "scale": SCALE.to("meta"),
            "zero_point": torch.zeros(4, dtype=torch.int8, **META),
            "bias": torch.ones(4, **META),
            "in_scale": torch.ones(6, **META),
            "residual": torch.ones(5, 4, **META),
        }.items()
    ),
]


@pytest.mark.parametrize("case", range(len(LINEAR)))
def test_linear(case):
    kind, text, change = LINEAR[case]
    with pytest.raises(kind, match=re.escape(f"qlinear: {text}")):
        qlinear(**{"x": X, "qweight": W, "scale": SCALE} | change)


PICTURE, SCALES = torch.ones(3, 6, 9, 7), torch.ones(8)
KERNEL = torch.zeros(8, 6, 3, 3, dtype=torch.int8)
CONV = [
    (TypeError, "x must be float32, bfloat16, float16, float64 or int8, got", {"x": PICTURE.int()}),
    (ValueError, "x must be [B, C, H, W], got shape [6, 9, 7]", {"x": PICTURE[0]}),
    (ValueError, "x must be [B, C, H, W], got shape [3, 0, 9, 7]", {"x": PICTURE[:, :0]}),
    (
        ValueError,
        "qweight must be [1, 9, 16, 4], 8 rows of 9 * 4 codes of 8 bits, got shape [1, 18, 16, 4]",
        {"x": PICTURE[:, :4]},
    ),
    (ValueError, "x must be at least 3 high for this kernel, got 2", {"x": PICTURE[:, :, :2]}),
    (ValueError, "x must be at least 1 wide", {"x": PICTURE[..., :0], "padding": 2}),
    (ValueError, "qweight must be [1, 50, 16, 4], 8 rows of 25 * 6", {"kernel_size": 5}),
    (ValueError, "qweight must be [1, 9, 16, 4], 8 rows of 9 * 6 codes of 4", {"bits": 4}),
    (TypeError, "qweight must be uint8, got torch.int8; give", {"qweight": KERNEL}),
    (ValueError, "scale must be [N] or [N, groups], got shape []", {"scale": SCALES[0]}),
    (ValueError, f"{NO_GROUPS} 6 groups for 9 * 6", {"scale": torch.ones(8, 6)}),
    (ValueError, f"{NO_GROUPS} 3 groups for 9 * 6", {"scale": torch.ones(8, 3)}),
    (ValueError, f"{NO_GROUPS} 36 groups for 9 * 6", {"scale": torch.ones(8, 36)}),
    (TypeError, "zero_point must be int8, got", {"zero_point": torch.zeros(8)}),
    (ValueError, "bias must be [8], got shape [6]", {"bias": torch.ones(6)}),
    (ValueError, "in_scale must be [6], got shape [8]", {"in_scale": SCALES}),
    (
        ValueError,
        "x_scale must be [3], got shape [2]",
        {"x": PICTURE.char(), "x_scale": SCALES[:2]},
    ),
    (
        ValueError,
        "residual must be [3, 8, 7, 5], got shape [3, 8, 9, 7]",
        {"residual": torch.ones(3, 8, 9, 7)},
    ),
    (ValueError, "stride must be at least 1, got (0, 0)", {"stride": 0}),
    (ValueError, "padding must be at least 0, got (1, -1)", {"padding": (1, -1)}),
    (ValueError, "dilation must be at least 1, got (0, 0)", {"dilation": 0}),
    (ValueError, "kernel_size must be at least 1, got (0, 0)", {"kernel_size": 0}),
    (ValueError, "groups must be positive and divide 6 input and 8 output", {"groups": 3}),
    (ValueError, "groups must be positive and divide 6 input and 8 output", {"groups": 4}),
    (ValueError, "groups must be positive and divide 6 input and 8 output", {"groups": 0}),
    (
        ValueError,
        "bias must be on the device of x (cpu), got meta",
        {"bias": torch.ones(8, device="meta")},
    ),
    (
        ValueError,
        "K must be at most 65536 where integers are accumulated in 32 bits, got 65538",
        {
            "x": torch.ones(1, 7282, 3, 3),
            "qweight": pack(torch.zeros(8, 7282, 3, 3, dtype=torch.int8)),
            "act_bits": 8,
        },
    ),
]


@pytest.mark.parametrize("case", range(len(CONV)))
def test_conv(case):
    kind, text, change = CONV[case]
    args = {"x": PICTURE, "qweight": pack(KERNEL), "scale": SCALES, "kernel_size": 3}
    with pytest.raises(kind, match=re.escape(f"qconv2d: {text}")):
        qconv2d(**args | change)


ONE = {"draws": [0], "coeffs": [1.0]}
STEPS = {"perturb": "codes", "headroom": 2}
NUMBERS = "coeffs must be whole numbers up to the headroom of 2, got"
PERTURBED = [
    ("perturb must be one of ('none', 'scale', 'scale_relative',", {"perturb": "all"}),
    ("kind must be one of ('normal', 'rademacher'), got 'cauchy'", {"kind": "cauchy"}),
    ("kind must be 'rademacher' where perturb='weight', got 'normal'", {"kind": "normal"}),
    ("draws must be none where perturb='none', got 1", {"perturb": "none"}),
    ("draws must be none where perturb='none', got 0", {"perturb": "none", "draws": ()}),
    ("draws must be at least one, got 0", {"draws": (), "coeffs": ()}),
    ("draws must be 64-bit, got", {"draws": [2**64]}),
    ("seed must be 64-bit, got", {"seed": -(2**63) - 1}),
    ("stream must be in [0, 2^32), got 4294967296", {"stream": 2**32}),
    ("stream must be in [0, 2^32), got -1", {"stream": -1}),
    ("coeffs must be a float32 tensor [1] on the CPU, got None", {"coeffs": None}),
    ("coeffs must be a float32 tensor [1] on the CPU, got torch.float32 [2]", {"coeffs": [1, 2]}),
    ("coeffs must be a float32 tensor [1] on", {"coeffs": torch.ones(1, dtype=torch.float64)}),
    ("coeffs must be a float32 tensor [1] on", {"coeffs": torch.ones(1, device="meta")}),
    ("coeffs must be finite, got nan", {"coeffs": [float("nan")]}),
    ("x must be of a batch that 3 perturbations divide", {"draws": [0] * 3, "coeffs": [1] * 3}),
    ("x must be of a batch that 1 perturbations divide, got shape [6]", {"x": X[0]}),
    ("headroom must be 1 to 127 where perturb='codes', got 0", {"perturb": "codes"}),
    ("headroom must be 1 to 127 where", {"perturb": "codes", "headroom": 128}),
    (
        "headroom must be 1 to 15 where perturb='codes', got 16",
        {"perturb": "codes", "headroom": 16, "bits": 4, "qweight": W[:, :1]},
    ),
    ("zero_point must be None where perturb='codes'", STEPS | {"zero_point": SCALE.char()}),
    (f"{NUMBERS} 0.5", STEPS | {"coeffs": [0.5]}),
    (f"{NUMBERS} 3.0", STEPS | {"coeffs": [3]}),
    (f"{NUMBERS} -3.0", STEPS | {"coeffs": torch.tensor([-3.0])}),
    (f"{NUMBERS} nan", STEPS | {"coeffs": torch.tensor([float("nan")])}),
    (f"{NUMBERS} inf", STEPS | {"coeffs": torch.tensor([float("inf")])}),
]


@pytest.mark.parametrize("case", range(len(PERTURBED)))
def test_perturbed(case):
    text, change = PERTURBED[case]
    args = {"x": X[:4], "qweight": W, "scale": SCALE, "perturb": "weight"} | ONE | change
    with pytest.raises(ValueError, match=re.escape(f"qlinear: {text}")):
        qlinear(**args)
