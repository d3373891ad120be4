# SPDX-License-Identifier: Apache-2.0
"""Modules that hold integer weights and call the ops of `zo_kernels.ops`."""

from zo_kernels.nn._base import QuantModule
from zo_kernels.nn.conv2d import QuantConv2d
from zo_kernels.nn.linear import QuantLinear

__all__ = ["QuantConv2d", "QuantLinear", "QuantModule"]
