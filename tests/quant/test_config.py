# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from zo_kernels.quant import QuantConfig, Spec


def test_defaults():
    assert QuantConfig() == QuantConfig(
        spec="w8", rounding="absmax", skip=(), overrides=(), headroom=0, fallback=None
    )
    assert QuantConfig().spec_for("any.layer") == "w8"


def test_skip_wins_over_overrides_and_patterns_are_wildcards():
    config = QuantConfig(skip=["*.to_q"], overrides={"down.*": "w4-g64", "down.0.*": "w4"})
    assert config.spec_for("down.0.to_q") is None
    assert config.spec_for("down.0.to_k") == "w4-g64"
    assert config.spec_for("up.0.to_k") == "w8"
    assert config.patterns() == ("*.to_q", "down.*", "down.0.*")


def test_specs_may_be_objects():
    config = QuantConfig(Spec(4, 8, 64), overrides={"a": Spec()}, fallback=Spec(8, 8))
    assert config == QuantConfig("w4a8-g64", overrides={"a": "w8"}, fallback="w8a8")
    assert config.to_dict()["spec"] == "w4a8-g64"


def test_frozen_and_hashable_whatever_the_containers():
    config = QuantConfig(skip=["a"], overrides={"b": "w8"})
    assert config == QuantConfig(skip=("a",), overrides=(("b", "w8"),))
    assert hash(config) == hash(QuantConfig(skip=("a",), overrides=(("b", "w8"),)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.spec = "w4"


def test_dict_round_trip_through_json():
    config = QuantConfig(
        "w4a8-g128",
        "mse",
        skip=("conv_in",),
        overrides=(("up.*", "w8"),),
        headroom=3,
        fallback="w8",
    )
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"spec": "w3"}, ValueError, "QuantConfig: spec must be w8, w4, .* got 'w3'"),
        (
            {"overrides": {"*": "int8"}},
            ValueError,
            "QuantConfig: spec must be w8, w4, .* got 'int8'",
        ),
        (
            {"rounding": "nearest"},
            ValueError,
            "rounding must be one of absmax, mse, l2.4, got 'nearest'",
        ),
        ({"skip": "conv_in"}, TypeError, r"skip must be a sequence of patterns, got the string"),
        ({"fallback": "w8a16"}, ValueError, "QuantConfig: spec must be w8, w4, .* got 'w8a16'"),
        ({"headroom": 100}, ValueError, "QuantConfig: headroom must be an integer from 0 to 63"),
        (
            {"headroom": 1, "overrides": {"a": "w8-asym"}},
            ValueError,
            "headroom must be 0 with asymmetric codes, got 1 and w8, w8-asym",
        ),
        ({"skip": [3]}, TypeError, "pattern must be a string, got 3"),
    ],
)
def test_bad_fields(fields, kind, text):
    with pytest.raises(kind, match=text):
        QuantConfig(**fields)


def test_dict_of_the_first_version():
    values = {"spec": "w8", "rounding": "absmax", "skip": ["a"], "overrides": [["b", "w8"]]}
    assert QuantConfig.from_dict(values) == QuantConfig(skip=("a",), overrides={"b": "w8"})


def test_dict_of_another_version():
    with pytest.raises(
        ValueError, match=r"from_dict: values must hold known fields, got \['bits'\]"
    ):
        QuantConfig.from_dict({"spec": "w8", "bits": 8})
