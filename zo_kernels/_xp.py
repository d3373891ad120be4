# SPDX-License-Identifier: Apache-2.0
"""What torch and numpy spell differently, so that one text can run on tensors and on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np


class Numpy:
    """Arrays; bf16 numbers, which numpy lacks, are their bits: uint16."""

    int64, int32, int16, float32 = np.int64, np.int32, np.int16, np.float32
    where, sqrt, zeros_like = np.where, np.sqrt, np.zeros_like

    @staticmethod
    def cast(x: Any, dtype: Any) -> Any:
        return x.astype(dtype)

    @staticmethod
    def stack(xs: Sequence[Any]) -> Any:
        return np.stack(xs, axis=1)

    @staticmethod
    def load(x: Any, dtype: str) -> Any:
        """As fp32."""
        if dtype == "bfloat16":
            return (x.astype(np.uint32) << 16).view(np.float32)
        return x.astype(np.float32)

    @staticmethod
    def nearest(x: Any, dtype: str) -> Any:
        """Bits of fp32 `x` in "bfloat16" or "float16", ties to even: int16."""
        if dtype == "float16":
            with np.errstate(over="ignore"):
                return x.astype(np.float16).view(np.int16)
        bits = x.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16).view(np.int16)


@cache
def torch_() -> Any:
    """The same of torch, which is imported here."""
    import torch

    class Torch:
        int64, int32, int16, float32 = torch.int64, torch.int32, torch.int16, torch.float32
        where, zeros_like = torch.where, torch.zeros_like

        @staticmethod
        def cast(x: Any, dtype: Any) -> Any:
            return x.to(dtype)

        @staticmethod
        def stack(xs: Sequence[Any]) -> Any:
            return torch.stack(list(xs), dim=1)

        @staticmethod
        def sqrt(x: Any) -> Any:
            # torch's fp32 root may come from a vector library that is an ulp off. By way of fp64 it
            # is correctly rounded: no root of an fp32 number lies that close to a rounding border.
            return x.double().sqrt().float()

        @staticmethod
        def load(x: Any, dtype: str) -> Any:
            return x.float()

        @staticmethod
        def nearest(x: Any, dtype: str) -> Any:
            return x.to(getattr(torch, dtype)).view(torch.int16)

    return Torch
