# SPDX-License-Identifier: Apache-2.0
"""Turn a float model into one that holds integers, and keep it in a file."""

from zo_kernels.nn import Spec
from zo_kernels.quant.calibrate import Reconstruction, reconstruct_
from zo_kernels.quant.checkpoint import quantize_checkpoint
from zo_kernels.quant.config import QuantConfig
from zo_kernels.quant.convert import QuantReport, dequantize, quantize_, quantize_empty_
from zo_kernels.quant.rounding import Rounded, absmax, l24, mse
from zo_kernels.quant.serialize import load_quantized, save_quantized

__all__ = [
    "QuantConfig",
    "QuantReport",
    "Reconstruction",
    "Rounded",
    "Spec",
    "absmax",
    "dequantize",
    "l24",
    "load_quantized",
    "mse",
    "quantize_",
    "quantize_checkpoint",
    "quantize_empty_",
    "reconstruct_",
    "save_quantized",
]
