# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import re

import pytest
import torch

from zo_kernels.nn import Spec
from zo_kernels.quant.formats import from_stored, stored_form, to_stored

EVERY = [
    Spec(bits, act_bits, group, asymmetric)
    for bits, act_bits, group, asymmetric in itertools.product(
        (8, 4), (16, 8), (None, 32, 64, 128), (False, True)
    )
]


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_every_spec_has_one_name(spec):
    assert Spec.parse(str(spec)) == spec
    assert Spec.parse(spec) is spec
    assert str(Spec.parse(str(spec))) == str(spec)


def test_names():
    assert [str(s) for s in (Spec(), Spec(4, 8, 64), Spec(4, 16, 32, True))] == [
        "w8",
        "w4a8-g64",
        "w4-g32-asym",
    ]
    assert len({str(spec) for spec in EVERY}) == len(EVERY)


@pytest.mark.parametrize(
    "text",
    ["", "w3", "W8", "w8a16", "w8a4", "w8g64", "w4-g48", "w4-asym-g64", "w8a8 ", "int8", 8, None],
)
def test_others_are_refused_with_what_is_possible(text):
    with pytest.raises(ValueError, match=r"here: spec must be w8, w4, w8a8 or w4a8, then -g32, -g"):
        Spec.parse(text, "here")


@pytest.mark.parametrize(
    ("field", "value"), [("bits", 2), ("act_bits", 4), ("group", 16), ("asymmetric", "yes")]
)
def test_fields_are_checked(field, value):
    with pytest.raises(ValueError, match=f"Spec: {field} must be one of .*, got {value!r}"):
        Spec(**{field: value})
    with pytest.raises(dataclasses.FrozenInstanceError):
        Spec().bits = 4


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        ("w8", (3, 5), None),
        ("w4-g32", (3, 64), None),
        ("w4-g32", (3, 32, 3, 3), None),
        ("w4-g32", (3, 48), "groups of 32 do not divide its 48 input channels"),
        # K = 128 is four groups, but a group would reach over two taps.
        ("w4-g32", (3, 8, 4, 4), "groups of 32 do not divide its 8 input channels"),
        ("w8", (3, 0), r"it is empty, of shape \[3, 0\]"),
        ("w8", (3, 70000), None),
        ("w8a8", (3, 65536), None),
        ("w8a8", (3, 7282, 3, 3), "a row of 65538 integers is longer than 65536"),
    ],
)
def test_misfit(spec, shape, reason):
    got = Spec.parse(spec).misfit(shape)
    assert (got is None) == (reason is None)
    assert reason is None or re.match(reason, got)


def test_shape_of_scales():
    assert Spec().scale_shape((7, 9)) == (7,)
    assert Spec(4, 8, 32).scale_shape((7, 64)) == (7, 2)
    assert Spec(4, 8, 32).scale_shape((7, 64, 3, 3)) == (7, 18)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (4, 3, 3, 3), (2, 5, 1, 2)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_stored_codes_round_trip(shape, bits):
    low, high = Spec(bits).code_range
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=g)
    stored = to_stored(codes, bits)
    assert (stored.dtype, tuple(stored.shape)) == stored_form(shape, bits)
    assert torch.equal(from_stored(stored, shape, bits), codes)


def test_stored_4_bits_byte_by_byte():
    codes = torch.tensor([[-8, 7, 0], [1, -1, 2]], dtype=torch.int8)
    assert to_stored(codes, 4).tolist() == [[0xF0, 0x88], [0x79, 0x8A]]
    # K order: channels run fastest, then the taps.
    conv = torch.tensor([[[[-8, -7]], [[-6, -5]]]], dtype=torch.int8)  # [1, 2, 1, 2]
    assert to_stored(conv, 4).tolist() == [[0x20, 0x31]]
