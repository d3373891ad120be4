# SPDX-License-Identifier: Apache-2.0
"""Integer weights that other libraries made, taken over as they are.

Nothing is rounded again: the weight of each module is, bit for bit, what the source dequantizes.
None of the libraries is needed here, only their files or state dicts.
"""

from zo_kernels.quant.imports._gguf_file import GGUF
from zo_kernels.quant.imports.gguf import load_gguf
from zo_kernels.quant.imports.quanto import load_quanto
from zo_kernels.quant.imports.torchao import load_torchao

__all__ = ["GGUF", "load_gguf", "load_quanto", "load_torchao"]
