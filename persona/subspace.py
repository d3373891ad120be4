# SPDX-License-Identifier: Apache-2.0
"""Subspace Gradient: project out the directions in which the token has hardly moved.

ZOODiP (arXiv 2503.14868), algorithm 2 and equations 4 to 8. A buffer B [tau, d] collects the
updated tokens; every tau steps B is standardized per dimension, and P holds its right singular
vectors behind the first i* that explain more than 1 - nu of the variance:

    i* = min{i : sum_{j<=i} lambda_j / sum_k lambda_k > 1 - nu},   g' = g (I - P^T P)

As in the paper and its code, P lives in standardized coordinates and is applied to the raw
gradient.
"""

import torch
from torch import Tensor

MODES = ("subspace", "centred", "random", "off")


class SubspaceGradient:
    """The buffer and the projection of one token set of R vectors in R^d, taken as one vector R*d.

    Args:
        dim: R * d.
        tau: steps between two updates of P; the buffer holds as many tokens.
        nu: share of the variance that P may hold, in [0, 1).
        mode: "subspace"; "centred" takes the principal directions of the buffer without
            standardizing it, in the gradient's own coordinates; "random" projects out as many
            random directions (the control that tells whether the choice of directions matters);
            "off" returns the gradient.
        seed: of the random control.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, dim: int, *, tau: int = 128, nu: float = 1e-3, mode: str = "subspace", seed: int = 0
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"SubspaceGradient: mode must be one of {MODES}, got {mode!r}")
        if tau < 2:
            raise ValueError(f"SubspaceGradient: tau must be at least 2, got {tau}; paper: 128")
        if not 0 <= nu < 1:
            raise ValueError(f"SubspaceGradient: nu must be in [0, 1), got {nu}; paper: 1e-3")
        self.mode, self.nu, self.seed = mode, nu, seed
        self.buffer = torch.zeros(tau, dim)
        self.filled = 0
        self.updates = 0
        self.basis = torch.zeros(0, dim)  # [removed directions, dim], orthonormal rows

    def project(self, gradient: Tensor) -> Tensor:
        """g (I - P^T P) for a gradient of ``dim`` elements, in its own shape."""
        flat = gradient.reshape(-1)
        return (flat - (flat @ self.basis.T) @ self.basis).view_as(gradient)

    def observe(self, token: Tensor) -> None:
        """Record the updated token (``dim`` elements); every tau of them P is made anew."""
        if self.mode == "off":
            return
        self.buffer[self.filled] = token.detach().reshape(-1)
        self.filled += 1
        if self.filled == len(self.buffer):
            self.basis = self._new_basis()
            self.filled = 0
            self.updates += 1

    def _new_basis(self) -> Tensor:
        moved = self.buffer.double() - self.buffer.double().mean(0)
        if self.mode != "centred":
            spread = moved.std(0, correction=0)
            # A dimension that did not move at all has no variance to explain.
            moved = moved / torch.where(spread > 0, spread, torch.ones_like(spread))
        _, sigma, vt = torch.linalg.svd(moved, full_matrices=False)
        explained = torch.cumsum(sigma.square(), 0) / sigma.square().sum().clamp_min(1e-300)
        kept = int((explained <= 1 - self.nu).sum()) + 1  # i*
        removed = vt[kept:]
        if self.mode == "random":
            generator = torch.Generator().manual_seed(self.seed + self.updates)
            noise = torch.randn(*removed.T.shape, dtype=torch.float64, generator=generator)
            removed = torch.linalg.qr(noise).Q.T
        return removed.float().contiguous()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "buffer": self.buffer,
            "basis": self.basis,
            "counts": torch.tensor([self.filled, self.updates]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.buffer, self.basis = state["buffer"].clone(), state["basis"].clone()
        self.filled, self.updates = state["counts"].tolist()
