# SPDX-License-Identifier: Apache-2.0
"""Where a token is sought: all of the embedding space, or directions that its vocabulary takes.

A token theta [R, d] is written theta = start + u A with coordinates u [R, k] and a map A [k, d]
whose rows are orthogonal; what optimizes, probes and moves u. "vocabulary" has the k leading
principal directions of the embedding table as rows, each as long as the table spreads along it,
relative to the k's root mean square: a random direction in u is then one in which words differ.
"subspace" has the same directions at unit length, and "random" as many random ones: the control
that tells the choice from the number of dimensions. "encoder" has the k leading directions, at unit
length, of what the text encoder lets through (`persona.encoder_jacobian`). All of this is ours, not
ZOODiP's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SPACES = ("full", "vocabulary", "subspace", "random", "encoder")


class Space:
    """The map from coordinates to token rows.

    Args:
        start: fp32 [R, d], the token at u = 0.
        table: the vocabulary's embeddings [V, d], any dtype; read once.
        kind: one of `SPACES`; "full" is theta itself, u = theta.
        rank: k; 0: d, the most.
        seed: of "random".
        moment: of "encoder", makes J^T J [d, d].

    Raises:
        ValueError: unknown kind, a rank that is negative or above d, or "encoder" without a moment.
    """

    def __init__(
        self,
        start: Tensor,
        table: Tensor,
        kind: str,
        rank: int = 0,
        seed: int = 0,
        moment: Callable[[], Tensor] | None = None,
    ) -> None:
        width = start.shape[1]
        if kind not in SPACES:
            raise ValueError(f"Space: kind must be one of {SPACES}, got {kind!r}; choose one")
        if not 0 <= rank <= width:
            raise ValueError(f"Space: rank must be from 0 to {width}, got {rank}; 0 is all")
        self.start = start.clone()
        self.map: Tensor | None = None  # [k, d]
        if kind == "encoder":
            if moment is None:
                raise ValueError("Space: moment must be given for encoder, got None; pass J^T J")
            self.map = _leading(moment(), rank or width)[1].float().contiguous()
        elif kind != "full":
            self.map = _rows(table, kind, rank or width, seed)

    def coordinates(self) -> Tensor:
        """u of the start: fp32 [R, k]."""
        if self.map is None:
            return self.start.clone()
        return torch.zeros(len(self.start), len(self.map))

    def rows(self, u: Tensor) -> Tensor:
        """Token rows [..., R, d] of coordinates [..., R, k]."""
        return u if self.map is None else self.start + u @ self.map


def _rows(table: Tensor, kind: str, rank: int, seed: int) -> Tensor:
    width = table.shape[1]
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(width, rank, dtype=torch.float64, generator=generator)
        return torch.linalg.qr(noise).Q.T.float().contiguous()
    # The covariance is [d, d], whatever the vocabulary: no second table in memory.
    mean = _mean(table)
    moment = torch.zeros(width, width, dtype=torch.float64)
    for part in table.detach().split(1024):
        centred = part.to("cpu", torch.float64) - mean
        moment += centred.T @ centred
    values, directions = _leading(moment / len(table), rank)
    if kind == "vocabulary":
        spread = values.clamp_min(0).sqrt()
        directions = directions * (spread / spread.square().mean().sqrt())[:, None]
    return directions.float().contiguous()


def _leading(moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues [rank] of a symmetric matrix [d, d], and their vectors as rows."""
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0)[:rank], vectors.T.flip(0)[:rank]


def _mean(table: Tensor) -> Tensor:
    parts = [part.to("cpu", torch.float64).sum(0) for part in table.detach().split(1024)]
    return torch.stack(parts).sum(0) / len(table)
