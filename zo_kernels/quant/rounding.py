# SPDX-License-Identifier: Apache-2.0
"""From a float weight to integers: each rule maps a weight to codes, scale and zero point.

A rule sees the weight of one layer, output channels first, and the `Spec` that it shall have, so
that `weight ~ scale * (codes - zero_point)`. `ROUNDINGS` names the rules that a `QuantConfig` can
ask for; one that needs calibration data (AdaRound, BRECQ) is bound to its data and added there.

Symmetric codes are -127 to 127, or -7 to 7 with 4 bits: negation is exact. Asymmetric codes are all
256 or 16, and weight 0 is always a code. Groups run along the K order of `zo_kernels.packing`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zo_kernels.nn import Spec
from zo_kernels.nn._korder import chunks, from_rows, scratch, to_rows

STEPS = 80  # of the range search, each a hundredth of the range, as Q-Diffusion takes them
_TINY = torch.finfo(torch.float32).tiny
_CHUNK = 1 << 17  # elements; the range search reads a chunk 80 times, so it should fit the cache
W8 = Spec()


class Rounded(NamedTuple):
    """A weight as integers.

    Attributes:
        codes: int8 in the shape of the weight.
        scale: fp32 [N], or [N, K / group].
        zero_point: int8 of the shape of scale; None where symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


Rounding = Callable[[Tensor, Spec, int], Rounded]


def absmax(weight: Tensor, spec: Spec | str = W8, headroom: int = 0) -> Rounded:
    """The grid spans all weights of a channel or group; codes = round(w / scale), ties to even.

    With spec w8 this is what optimum-quanto's `AbsmaxOptimizer` with qint8 does on axis 0 (ZOODiP's
    quantizer): scale = max|w| / 127. A channel of zeros, or one whose scale is below fp32's
    smallest normal number, gets that number as scale: its codes stay finite, the product (nearly)
    zero.

    Args:
        weight: floating [N, K] or [N, C, kh, kw], N output channels; finite.
        spec: what to round to.
        headroom: symmetric codes of 8 bits stay within 127 - headroom. 4 bits take no notice.

    Raises:
        ValueError: the weight cannot be stored so, or headroom does not fit the spec.
    """
    return _round(weight, spec, headroom, order=None)


def mse(weight: Tensor, spec: Spec | str = W8, headroom: int = 0) -> Rounded:
    """`absmax` with the range of each channel or group shrunk to the share, of 1, 0.99, ..., 0.21,
    that makes the sum of squared errors least.

    Weights beyond the range are clamped. Arguments and errors: see `absmax`.
    """
    return _round(weight, spec, headroom, order=2.0)


def l24(weight: Tensor, spec: Spec | str = W8, headroom: int = 0) -> Rounded:
    """`mse` with |error|^2.4 in the place of squares: the range search of Q-Diffusion's code (arXiv
    2302.04304), "l2.4" in a `QuantConfig`. It clamps less than `mse` does.

    There ranges are of output channels and asymmetric: "-asym". Arguments and errors: see `absmax`.
    """
    return _round(weight, spec, headroom, order=2.4)


class _Grid(NamedTuple):
    """The codes that rows are rounded to."""

    low: int
    high: int
    asymmetric: bool

    def bounds(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The range of each of rows [R, g], 0 included: two tensors [R, 1]."""
        low, high = (bound[:, None] for bound in rows.aminmax(dim=1))
        if self.asymmetric:
            return low.clamp_(max=0), high.clamp_(min=0)
        high = torch.maximum(-low, high)
        return -high, high

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale [R, 1] and zero point (fp32) of codes that span a range."""
        if not self.asymmetric:
            return self._scale(high, self.high), None
        scale = self._scale(high - low, self.high - self.low)
        return scale, (self.low - low / scale).round_().clamp_(self.low, self.high)

    @staticmethod
    def _scale(span: Tensor, steps: int) -> Tensor:
        return (span / steps).clamp_(min=_TINY)

    def codes(self, rows: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """fp32 integers of the shape of rows."""
        codes = torch.div(rows, scale).round_()
        if zero is not None:
            codes += zero
        return codes.clamp_(self.low, self.high)


def _best_range(
    rows: Tensor, grid: _Grid, low: Tensor, high: Tensor, order: float
) -> tuple[Tensor, Tensor]:
    """The range [low, high] of each row, shrunk to the share of it with the least norm of errors of
    that order."""
    best = torch.ones_like(low)
    least = torch.full_like(low, torch.inf)
    for step in range(STEPS):
        share = 1 - step / 100
        if (
            step
            and step % 4 == 0
            and _hopeless(rows, grid, low * share, high * share, least, order)
        ):
            break
        scale, zero = grid.fit(low * share, high * share)
        errors = grid.codes(rows, scale, zero)
        if zero is not None:
            errors -= zero
        error = _norm(errors.mul_(scale).sub_(rows), order)
        better = error < least
        least = torch.where(better, error, least)
        best.masked_fill_(better, share)
    return low * best, high * best


def _hopeless(
    rows: Tensor, grid: _Grid, low: Tensor, high: Tensor, least: Tensor, order: float
) -> bool:
    """Whether clamping alone costs every row more than `least`, in this range and all smaller ones.

    A zero point that is rounded moves the range by half a step at most.
    """
    slack = (high - low) / (2 * (grid.high - grid.low)) if grid.asymmetric else 0
    clamped = _norm(rows.clamp(low - slack, high + slack).sub_(rows), order)
    return bool((clamped > least * 1.0001).all())


def _norm(errors: Tensor, order: float) -> Tensor:
    return torch.linalg.vector_norm(errors, order, dim=1, keepdim=True)


def _round(
    weight: Tensor,
    spec: Spec | str,
    headroom: int,
    order: float | None,
) -> Rounded:
    spec = Spec.parse(spec)
    grid = grid_of(spec, headroom)
    if (misfit := spec.misfit(weight.shape)) is not None:
        raise ValueError(
            f"rounding: weight must be one that {spec} can store, got one of which {misfit}; "
            "choose another spec for it"
        )
    weight = weight.detach()
    codes = scratch(weight.shape, weight.device)
    scale = torch.empty(spec.scale_shape(weight.shape), device=weight.device)
    zero_point = torch.empty_like(scale, dtype=torch.int8) if spec.asymmetric else None
    for part in chunks(weight, _CHUNK):
        rows = to_rows(weight[part]).float()
        rows = rows.reshape(-1, spec.group or rows.shape[1])  # [R, g], a row for each scale
        bounds = grid.bounds(rows)
        if order is not None:
            bounds = _best_range(rows, grid, *bounds, order)
        scales, zeros = grid.fit(*bounds)
        codes[part] = grid.codes(rows, scales, zeros).view_as(codes[part])
        scale[part] = scales.view_as(scale[part])
        if zero_point is not None and zeros is not None:
            zero_point[part] = zeros.view_as(zero_point[part])
    return Rounded(from_rows(codes, weight.shape), scale, zero_point)


def grid_of(spec: Spec, headroom: int) -> _Grid:
    """The codes that a weight of `spec` may have."""
    check_headroom(headroom, "rounding")
    low, high = spec.code_range
    if spec.asymmetric and headroom:
        raise ValueError(
            f"rounding: headroom must be 0 where codes are asymmetric ({spec}), got {headroom}; "
            "choose a symmetric spec"
        )
    if spec.asymmetric:
        return _Grid(low, high, True)
    if spec.bits == 8:
        high -= headroom
    return _Grid(-high, high, False)


def check_headroom(headroom: int, where: str) -> None:
    """Raise ValueError unless codes of 8 bits can leave that much room."""
    if not isinstance(headroom, int) or not 0 <= headroom <= 63:
        raise ValueError(
            f"{where}: headroom must be an integer from 0 to 63, got {headroom!r}; 1 to 3 serve a "
            "perturbation of codes and cost at most 2.4 % of the resolution"
        )


ROUNDINGS: dict[str, Rounding] = {"absmax": absmax, "mse": mse, "l2.4": l24}
