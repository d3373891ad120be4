# SPDX-License-Identifier: Apache-2.0
"""Files of a learned token that other programs load."""

import re
from pathlib import Path

import torch
from torch import Tensor

from persona.errors import UserError
from persona.files import write_tensors

MAX_VECTORS = 75  # a prompt of 77 tokens less its two ends


def file_stem(token: str) -> str:
    """``<My Dog>`` -> ``my-dog``: the trigger word in programs that take it from the file name."""
    return re.sub(r"[^a-z0-9_-]+", "-", token.lower()).strip("-") or "token"


def save_embedding(
    folder: Path, token: str, rows: Tensor, metadata: dict[str, str]
) -> tuple[Path, Path]:
    """Write the token for diffusers and for A1111, ComfyUI, InvokeAI and kohya.

    ``learned_embeds.safetensors``: ``{token: [d]}`` ([n, d] for several vectors), which
    ``pipe.load_textual_inversion(folder)`` reads. ``<stem>.safetensors``:
    ``{"emb_params": [n, d]}``.

    Args:
        rows: [n, d].
        metadata: strings for the header of both files.

    Raises:
        UserError: rows are not finite or too many, or the folder refuses.
    """
    if len(rows) > MAX_VECTORS:
        raise UserError(f"num_vectors: must be at most {MAX_VECTORS}, got {len(rows)}; use fewer")
    if not torch.isfinite(rows).all():
        raise UserError(
            "save_embedding: rows must be finite, got NaN or infinity; lower --learning_rate and "
            "train again"
        )
    rows = rows.detach().float()
    header = {"format": "pt", "modelspec.trigger_phrase": token, **metadata}
    diffusers_file = folder / "learned_embeds.safetensors"
    write_tensors(diffusers_file, {token: rows[0] if len(rows) == 1 else rows}, header)
    other_file = folder / f"{file_stem(token)}.safetensors"
    write_tensors(other_file, {"emb_params": rows}, header)
    return diffusers_file, other_file
