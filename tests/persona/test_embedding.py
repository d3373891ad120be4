# SPDX-License-Identifier: Apache-2.0
"""Token embeddings in 16 bits: fp16 values, fp32 rows, and a model that does not notice."""

import pytest
import torch
from torch import nn

from persona.base import quantize
from persona.config import RunConfig
from persona.embedding import HalfEmbedding, halve_embeddings_
from persona.families import StableDiffusion

IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


def test_rows_are_fp32_of_fp16_values():
    table = nn.Embedding(10, 7)
    rows = HalfEmbedding(table.weight)(IDS)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, table.weight.detach().half()[IDS].float())


def test_a_model_keeps_its_dtype_and_almost_its_output(fresh_pipeline):
    encoder = fresh_pipeline().text_encoder
    with torch.no_grad():
        before = encoder(IDS)[0]
        assert halve_embeddings_(encoder)
        after = encoder(IDS)[0]
    assert encoder.dtype == after.dtype == torch.float32
    assert (after - before).norm() < 1e-3 * before.norm()
    assert encoder.get_input_embeddings().weight.dtype == torch.float16
    assert not halve_embeddings_(encoder)


@pytest.mark.parametrize("spoil", ["dtype", "range"])
def test_tables_that_stay(fresh_pipeline, spoil):
    encoder = fresh_pipeline().text_encoder
    table = encoder.get_input_embeddings()
    if spoil == "dtype":
        table.bfloat16()
    else:
        table.weight.data[2, 0] = -7e4
    assert not halve_embeddings_(encoder)
    assert encoder.get_input_embeddings() is table


@pytest.mark.parametrize(("base", "dtype"), [("as-loaded", torch.float32), ("int4", torch.float16)])
def test_which_runs_halve(fresh_pipeline, base, dtype):
    family = StableDiffusion(fresh_pipeline())
    quantize(RunConfig(base_precision=base), family)
    assert family.pipe.text_encoder.get_input_embeddings().weight.dtype == dtype
