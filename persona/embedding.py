# SPDX-License-Identifier: Apache-2.0
"""The table of token embeddings in 16 bits: a fifth of int4 Stable Diffusion 1.5 in fp32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HalfEmbedding(nn.Embedding):
    """A frozen table whose rows lie in fp16 and are looked up in fp32: those rows alone are
    converted. Rounding moves a value by 2^-11 of it at most, and one that was fp16 once not at all.

    `weight` is a buffer here: the dtype of a model, by which pipelines cast, is that of its
    parameters, and stays fp32.

    Args:
        table: fp32 [vocabulary, d], finite in fp16.
    """

    def __init__(self, table: Tensor, padding_idx: int | None = None) -> None:
        words, width = table.shape
        super().__init__(words, width, padding_idx, device="meta")
        del self.weight
        self.register_buffer("weight", table.detach().half())

    def forward(self, input: Tensor) -> Tensor:
        """fp32 [..., d] of ids [...]."""
        return F.embedding(input, self.weight).float()


def halve_embeddings_(text_encoder: Any) -> bool:
    """Hold the token embeddings of a transformers model in 16 bits, in place; False where they stay
    as they are: not fp32 (or 16 bits already), of another class, or too large for fp16.

    Hooks on the table are not taken along: halve first.
    """
    table = text_encoder.get_input_embeddings()
    if type(table) is not nn.Embedding or table.weight.dtype != torch.float32:
        return False
    weight, most = table.weight, torch.finfo(torch.float16).max
    if not weight.is_meta and max(map(abs, weight.aminmax())) > most:
        return False
    text_encoder.set_input_embeddings(HalfEmbedding(table.weight, table.padding_idx))
    return True
