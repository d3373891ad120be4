# SPDX-License-Identifier: Apache-2.0
"""Whether Triton kernels can run here. The kernels' own files import Triton: import them late."""

from importlib.util import find_spec

import torch

_installed = find_spec("triton") is not None


def triton_available() -> str | None:
    """None, or why this machine or installation can't run Triton kernels."""
    if not _installed:
        return "not installed (package `triton`)"
    if not torch.cuda.is_available():
        return "without a device: torch finds no GPU"
    return None
