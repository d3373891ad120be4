# SPDX-License-Identifier: Apache-2.0
"""`Spec`: how the weight of one layer is stored and multiplied, and the string that names it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

GROUPS = (32, 64, 128)
MAX_INTEGER_K = 65536  # |activation| <= 127 and |code - zero point| <= 255: the sum fits int32
_PATTERN = re.compile(r"w(\d+)(?:a(\d+))?(?:-g(\d+))?(-asym)?")
_POSSIBLE = "w8, w4, w8a8 or w4a8, then -g32, -g64 or -g128, then -asym, such as w4a8-g64-asym"


@dataclass(frozen=True)
class Spec:
    """How the weight of one layer is stored and multiplied.

    `str(spec)` and `Spec.parse` are inverse: `w<bits>`, `a8` where activations are rounded, `-g`
    and the size of the groups, `-asym`: "w8", "w4a8-g64", "w4-g32-asym".

    Attributes:
        bits: of a code, 8 or 4.
        act_bits: 16: activations keep their dtype (weight only). 8: the op rounds them to int8.
        group: columns of a row that share a scale, 32, 64 or 128 along the K order of
            `zo_kernels.packing`; None: one scale per output channel.
        asymmetric: whether each scale has a zero point.

    Raises:
        ValueError: a field is none of these.
    """

    bits: int = 8
    act_bits: int = 16
    group: int | None = None
    asymmetric: bool = False

    def __post_init__(self) -> None:
        for name, possible in (
            ("bits", (8, 4)),
            ("act_bits", (16, 8)),
            ("group", (None, *GROUPS)),
            ("asymmetric", (False, True)),
        ):
            if getattr(self, name) not in possible:
                raise ValueError(
                    f"Spec: {name} must be one of {possible}, got {getattr(self, name)!r}; "
                    "choose one of these"
                )

    @classmethod
    def parse(cls, text: "str | Spec", where: str = "Spec.parse") -> Self:
        """The spec that `text` names; a Spec is itself.

        Raises:
            ValueError: there is no such spec; `where` is the name that the message begins with.
        """
        if isinstance(text, cls):
            return text
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match:
            bits, act_bits, group, asymmetric = match.groups()
            size = int(group) if group else None
            # "w8a16" is refused, so that every spec has one name.
            if bits in ("8", "4") and act_bits in (None, "8") and size in (None, *GROUPS):
                return cls(int(bits), int(act_bits or 16), size, asymmetric is not None)
        raise ValueError(
            f"{where}: spec must be {_POSSIBLE}, got {text!r}; choose a format that can be stored"
        )

    def __str__(self) -> str:
        activations = "a8" if self.act_bits == 8 else ""
        group = f"-g{self.group}" if self.group else ""
        return f"w{self.bits}{activations}{group}{'-asym' if self.asymmetric else ''}"

    @property
    def code_range(self) -> tuple[int, int]:
        """The least and the largest code that has a place."""
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def misfit(self, shape: Sequence[int]) -> str | None:
        """Why a weight [N, K] or [N, C, kh, kw] cannot be stored so, or None."""
        k = 1
        for size in shape[1:]:
            k *= size
        if min(shape) < 1:
            return f"it is empty, of shape {list(shape)}"
        if self.group and shape[1] % self.group:
            return f"groups of {self.group} do not divide its {shape[1]} input channels"
        if self.act_bits == 8 and k > MAX_INTEGER_K:
            return f"a row of {k} integers is longer than {MAX_INTEGER_K}, so sums could overflow"
        return None

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a weight [N, K] or [N, C, kh, kw]: [N], or [N, K / group]."""
        if not self.group:
            return (shape[0],)
        count = 1
        for size in shape[1:]:
            count *= size
        return shape[0], count // self.group
