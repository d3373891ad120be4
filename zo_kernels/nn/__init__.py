# SPDX-License-Identifier: Apache-2.0
"""Modules that hold integer weights and call the ops of `zo_kernels.ops`."""

from zo_kernels.nn._base import QuantModule
from zo_kernels.nn._spec import Spec
from zo_kernels.nn.conv2d import QuantConv2d
from zo_kernels.nn.graphed import Graphed
from zo_kernels.nn.linear import QuantLinear
from zo_kernels.nn.perturb import input_stream, perturbed, streams_of
from zo_kernels.nn.scales import set_scales_, trainable_scales

__all__ = [
    "Graphed",
    "QuantConv2d",
    "QuantLinear",
    "QuantModule",
    "Spec",
    "input_stream",
    "perturbed",
    "set_scales_",
    "streams_of",
    "trainable_scales",
]
