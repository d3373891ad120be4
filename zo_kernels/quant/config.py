# SPDX-License-Identifier: Apache-2.0
"""`QuantConfig`: which layers of a model are quantized, and how. It travels in the header of a
saved model."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Self

from zo_kernels.nn import Spec
from zo_kernels.quant.rounding import ROUNDINGS, check_headroom


@dataclass(frozen=True)
class QuantConfig:
    """What `quantize_` does to a model.

    Patterns are shell wildcards (`fnmatch`, case-sensitive) on the full name of a layer as
    `model.named_modules()` gives it: `"conv_in"`, `"*.to_out.*"`, `"down_blocks.0.*"`.

    Attributes:
        spec: format of every layer that no override names; see `zo_kernels.quant.formats`.
        rounding: how codes and scales are chosen; a key of `zo_kernels.quant.rounding.ROUNDINGS`.
        skip: layers whose name matches one of these patterns stay as they are.
        overrides: (pattern, spec) pairs, or a mapping; the first pattern that matches decides.
        headroom: codes of 8 bits stay within 127 - headroom, so that each can be moved by so many
            steps; see `what="codes"` of `zo_kernels.nn.perturbed`. Codes of 4 bits have that room.
        fallback: spec of the layers that theirs does not fit, such as groups of 64 on a layer of 4
            input channels; None makes that an error.

    Specs may be given as `Spec` or as its string, which is kept.

    Raises:
        ValueError: an unknown spec or rounding; headroom out of range or with asymmetric codes.
        TypeError: `skip` or a pattern is not made of strings.
    """

    spec: str = "w8"
    rounding: str = "absmax"
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()
    headroom: int = 0
    fallback: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            raise TypeError(
                f"QuantConfig: skip must be a sequence of patterns, got the string {self.skip!r}; "
                f"write ({self.skip!r},)"
            )
        # A frozen dataclass is hashable only if its fields are: lists and dicts become tuples.
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "overrides", _pairs(self.overrides))
        object.__setattr__(self, "spec", _spec(self.spec))
        if self.fallback is not None:
            object.__setattr__(self, "fallback", _spec(self.fallback))
        for pattern in self.patterns():
            if not isinstance(pattern, str):
                raise TypeError(
                    f"QuantConfig: pattern must be a string, got {pattern!r}; "
                    "name layers as model.named_modules() does"
                )
        check_headroom(self.headroom, "QuantConfig")
        specs = (self.spec, self.fallback, *(spec for _, spec in self.overrides))
        if self.headroom and any(spec and Spec.parse(spec).asymmetric for spec in specs):
            raise ValueError(
                f"QuantConfig: headroom must be 0 with asymmetric codes, got {self.headroom} and "
                f"{', '.join(spec for spec in specs if spec)}; choose symmetric specs"
            )
        if self.rounding not in ROUNDINGS:
            raise ValueError(
                f"QuantConfig: rounding must be one of {', '.join(ROUNDINGS)}, "
                f"got {self.rounding!r}; choose one of these"
            )

    def patterns(self) -> tuple[str, ...]:
        """Every pattern of `skip` and `overrides`."""
        return (*self.skip, *(pattern for pattern, _ in self.overrides))

    def spec_for(self, name: str) -> str | None:
        """The spec of the layer `name`, or `None` where `skip` names it."""
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        for pattern, spec in self.overrides:
            if fnmatchcase(name, pattern):
                return spec
        return self.spec

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, also after a trip through JSON.

        Raises:
            ValueError: a field that this version does not know.
        """
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(
                f"QuantConfig.from_dict: values must hold known fields, got {sorted(unknown)}; "
                "it may come from a newer version"
            )
        return cls(**values)


def _pairs(
    overrides: Mapping[str, str] | Iterable[Iterable[str]],
) -> tuple[tuple[str, str], ...]:
    items = overrides.items() if isinstance(overrides, Mapping) else overrides
    return tuple((pattern, _spec(spec)) for pattern, spec in items)


def _spec(spec: str | Spec) -> str:
    return str(Spec.parse(spec, "QuantConfig"))
