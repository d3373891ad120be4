# SPDX-License-Identifier: Apache-2.0
"""Train with forward passes only, on quantized models: kernels, optimizers and modules for PyTorch.

Importing the package alone does not import torch: ``zo_kernels._C`` (noise into numpy arrays) is
for users without it.
"""

__version__ = "0.1.0"
