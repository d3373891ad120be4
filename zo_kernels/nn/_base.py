# SPDX-License-Identifier: Apache-2.0
"""What `QuantLinear` and `QuantConv2d` share: storage of the integers and how they move."""

import json
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from zo_kernels.nn._check import check_codes, check_state, check_weight
from zo_kernels.nn._korder import dequantized
from zo_kernels.nn._spec import Spec
from zo_kernels.nn._weight import WeightInfo
from zo_kernels.packing import PACKING, PANEL, pack, packed_shape, unpack

INTEGERS = ("qweight", "scale", "zero_point", "in_scale")  # buffers that keep their dtype
_CHUNK = 1 << 20  # codes that are packed at a time


class QuantModule(nn.Module):
    """A weight [N, ...] as packed integers, and an optional bias [N].

    | buffer | dtype, shape |
    |---|---|
    | `qweight` | uint8, the codes as `zo_kernels.packing` lays them out: the only copy |
    | `scale` | fp32 [N], or [N, K / group] |
    | `zero_point` | int8 of the shape of scale; None unless the spec is asymmetric |
    | `in_scale` | fp32, multiplied to the channels of the input; None as a rule: no factor |

    The buffers keep their dtype under `.to(dtype)`, `.half()` and the like: the integers are the
    model, and a scale rounded to 16 bits would shift a whole channel. The bias stays the parameter
    that it was, and follows the dtype. Moves between devices move everything.

    A `state_dict` has, beside buffers and bias, an extra state: version of the layout, spec and
    headroom as the bytes of a JSON object (a uint8 tensor, so that safetensors can store it).

    Attributes:
        spec: how the weight is stored and multiplied.
        headroom: whole steps (1 code with 8 bits, 1/16 code with 4) by which every code can be
            moved; see `what="codes"` of `zo_kernels.nn.perturbed`. 0 where there is none.
        inputs: channels of the input, the size of `in_scale`.
    """

    spec: Spec
    headroom: int
    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    in_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        spec: Spec | str,
    ) -> None:
        super().__init__()
        self.spec = Spec.parse(spec, type(self).__name__)
        if (misfit := self.spec.misfit(shape)) is not None:
            raise ValueError(
                f"{type(self).__name__}: spec must fit the weight, got {self.spec} for one of "
                f"which {misfit}; choose another spec"
            )
        self.headroom = 0
        self.perturbation: Mapping[str, Any] = {}  # keyword arguments of the op
        self.in_scales: Tensor | None = None  # [P, inputs], of each part of a batch
        self._shape = torch.Size(shape)
        self._dtype = dtype or torch.get_default_dtype()
        scale_shape = self.spec.scale_shape(shape)
        # Each byte of an all-zero weight: code 0 is stored as half of the range.
        fill = 0x80 if self.spec.bits == 8 else 0x88
        packed = packed_shape(shape, self.spec.bits)
        self.register_buffer("qweight", torch.full(packed, fill, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(scale_shape, dtype=torch.float32, device=device))
        self.register_buffer(
            "zero_point",
            torch.zeros(scale_shape, dtype=torch.int8, device=device)
            if self.spec.asymmetric
            else None,
        )
        self.register_buffer("in_scale", None)
        self.register_parameter(
            "bias",
            nn.Parameter(torch.zeros(shape[0], dtype=self._dtype, device=device)) if bias else None,
        )

    @property
    def weight(self) -> WeightInfo:
        """Shape, dtype and device of the weight, without values; see `WeightInfo`."""
        return WeightInfo(type(self).__name__, self._shape, self._dtype, self.qweight.device)

    def codes(self) -> Tensor:
        """A copy of the integers: int8 in the shape of the weight, -8 to 7 with 4 bits."""
        return unpack(self.qweight, self._shape, self.spec.bits)

    @property
    def inputs(self) -> int:
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """A float copy of the weight: scale * (code - zero point) * in_scale, fp32 in the weight's
        shape."""
        weight = dequantized(self.codes(), self.scale, self.zero_point)
        if self.in_scale is not None:
            factors = self.in_scale.view(-1, 1, self._shape[1], *[1] * (len(self._shape) - 2))
            weight.unflatten(0, (len(factors), -1)).mul_(factors)
        return weight

    def set_codes(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Take over a weight given as integers; the device becomes that of `codes`.

        Args:
            codes: int8 in the shape of the weight, any strides; -8 to 7 with 4 bits.
            scale: fp32 [N], or [N, K / group]; finite.
            zero_point: int8 of the shape of scale; None exactly where the spec is symmetric.

        Raises:
            TypeError: a tensor has another dtype.
            ValueError: another shape, codes that do not fit the bits, a scale that is not finite.
        """
        where = f"{type(self).__name__}.set_codes"
        check_codes(where, self.spec, self._shape, codes, scale, zero_point)
        self.qweight = _packed(codes, self.spec.bits)
        self.headroom = self._headroom_of(codes)
        self.scale = scale.detach().contiguous()
        self.zero_point = None if zero_point is None else zero_point.contiguous()

    def _stored(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """qweight, scale, zero_point, in_scale and bias, from where `nn.Module.__getattr__`
        finds them, whose search costs more than the checks of a tensor."""
        held: Any = self._buffers
        try:
            codes = held["qweight"], held["scale"], held["zero_point"], held["in_scale"]
            return *codes, self._parameters["bias"]
        except KeyError:  # held otherwise, such as a scale that became a parameter
            return self.qweight, self.scale, self.zero_point, self.in_scale, self.bias

    def _factored(self, x: Tensor, parts: Tensor, per_sample: bool) -> tuple[Tensor, Tensor | None]:
        """x times the factors that each part of the batch has of its own, and what is left for the
        op to multiply to its channels."""
        if len(x) % len(parts):  # the op refuses such a batch
            return x, self.in_scale
        factors = parts.repeat_interleave(len(x) // len(parts), 0)  # [B, inputs]
        between = [1] * (x.dim() - 2)
        shape = (len(x), -1, *between) if per_sample else (len(x), *between, -1)
        return (x * factors.view(shape)).to(x.dtype), None

    def _headroom_of(self, codes: Tensor) -> int:
        if self.spec.asymmetric or codes.is_meta:
            return 0
        low, high = (int(bound) for bound in codes.aminmax())
        if self.spec.bits == 8:
            return max(0, 127 - max(-low, high))
        return 15 if low >= -7 else 0  # 16 * 7 + 15 = 127: in sixteenths of a code

    @classmethod
    def _empty(
        cls, source: Any, device: torch.device | str, dtype: torch.dtype, spec: Spec
    ) -> Self:
        """A module with the shape of `source`; each subclass makes its own."""
        raise NotImplementedError

    @classmethod
    def like(
        cls,
        source: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        spec: Spec | str | None = None,
    ) -> Self:
        """An empty module to load a state into.

        Args:
            source: the layer whose place it takes: a float one, or one of this class.
            device, dtype: default those of `source`.
            spec: default that of `source` if it has one, else "w8".

        Raises:
            ValueError: no op computes this layer, or the spec does not fit it.
        """
        weight = source.weight
        chosen = Spec.parse(
            getattr(source, "spec", Spec()) if spec is None else spec, f"{cls.__name__}.like"
        )
        module = cls._empty(source, device or weight.device, dtype or weight.dtype, chosen)
        if module.bias is not None:
            module.bias.requires_grad_(source.bias.requires_grad)
        return module.train(source.training)

    @classmethod
    def from_codes(
        cls,
        source: Any,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        spec: Spec | str = "w8",
    ) -> Self:
        """A module in the place of `source` with this weight; the bias is shared with it.

        Args and errors: see `set_codes` and `like`.
        """
        module = cls.like(source, device="meta", spec=spec)
        module.set_codes(codes, scale, zero_point)
        module.bias = source.bias
        return module

    @classmethod
    def from_float(cls, source: Any, rounding: Any, spec: Spec | str = "w8", *more: Any) -> Self:
        """Round the weight of `source`, which is left as it is; the bias is shared with it.

        Args:
            source: `nn.Linear` or `nn.Conv2d`, as the class says; its weight must be finite.
            rounding: (weight, spec, *more) -> codes, scale, zero point, such as
                `zo_kernels.quant.absmax`.
            spec: how to store it.
            more: what else the rule takes: the headroom.

        Raises:
            TypeError: the weight is not a floating tensor.
            ValueError: the weight is not finite or on the meta device; or no op computes this
                layer.
        """
        check_weight(source.weight, f"{cls.__name__}.from_float", "weight")
        parsed = Spec.parse(spec, f"{cls.__name__}.from_float")
        cls.like(
            source, device="meta", spec=parsed
        )  # what is wrong with it is said before the work
        codes, scale, zero_point = rounding(source.weight, parsed, *more)
        return cls.from_codes(source, codes, scale, zero_point, parsed)

    def get_extra_state(self) -> Tensor:
        """Version of the packing, spec and headroom, as the bytes of a JSON object."""
        state = {"packing": PACKING, "spec": str(self.spec), "headroom": self.headroom}
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`; what does not fit was refused before.

        `load_state_dict` calls it.
        """
        self.headroom = json.loads(bytes(state.tolist()))["headroom"]

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Torch copies tensors before it hands out the extra state: look first.
        mine = {k: state_dict.get(prefix + k) for k in (*INTEGERS, "_extra_state")}
        check_state(prefix, self.spec, self.inputs, mine)
        if mine["in_scale"] is not None and self.in_scale is None:
            self.in_scale = torch.ones(self.inputs, device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: getattr(self, name) for name in INTEGERS}
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=kept["scale"].device)).dtype
        for name, before in kept.items():
            after = getattr(self, name)
            if before is None:
                continue
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
            elif not after.is_contiguous():  # .to(memory_format=torch.channels_last)
                setattr(self, name, after.contiguous())
        return self


def _packed(codes: Tensor, bits: int) -> Tensor:
    """`pack`, some panels at a time: large temporaries beside the small lasting tensors of a model
    would leave holes in the heap, which cost as much as the model does."""
    packed = torch.empty(packed_shape(codes.shape, bits), dtype=torch.uint8, device=codes.device)
    panels = max(1, _CHUNK * len(packed) // packed.numel())
    for start in range(0, len(packed), panels):
        rows = codes[start * PANEL : (start + panels) * PANEL]
        packed[start : start + panels] = pack(rows, bits)
    return packed
