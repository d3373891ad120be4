# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from zo_kernels.quant import QuantConfig


def test_defaults():
    assert QuantConfig() == QuantConfig(spec="w8", rounding="absmax", skip=(), overrides=())
    assert QuantConfig().spec_for("any.layer") == "w8"


def test_skip_wins_over_overrides_and_patterns_are_wildcards():
    config = QuantConfig(skip=["*.to_q"], overrides={"down.*": "w8"})
    assert config.spec_for("down.0.to_q") is None
    assert config.spec_for("down.0.to_k") == "w8"
    assert config.patterns() == ("*.to_q", "down.*")


def test_frozen_and_hashable_whatever_the_containers():
    config = QuantConfig(skip=["a"], overrides={"b": "w8"})
    assert config == QuantConfig(skip=("a",), overrides=(("b", "w8"),))
    assert hash(config) == hash(QuantConfig(skip=("a",), overrides=(("b", "w8"),)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.spec = "w4"


def test_dict_round_trip_through_json():
    config = QuantConfig(skip=("conv_in",), overrides=(("up.*", "w8"),))
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"spec": "w3"}, ValueError, "QuantConfig: spec must be one of w8, got 'w3'"),
        ({"overrides": {"*": "int8"}}, ValueError, "spec must be one of w8, got 'int8'"),
        ({"rounding": "nearest"}, ValueError, "rounding must be one of absmax, got 'nearest'"),
        ({"skip": "conv_in"}, TypeError, r"skip must be a sequence of patterns, got the string"),
        ({"skip": [3]}, TypeError, "pattern must be a string, got 3"),
    ],
)
def test_bad_fields(fields, kind, text):
    with pytest.raises(kind, match=text):
        QuantConfig(**fields)


def test_dict_of_another_version():
    with pytest.raises(
        ValueError, match=r"from_dict: values must hold known fields, got \['bits'\]"
    ):
        QuantConfig.from_dict({"spec": "w8", "bits": 8})
