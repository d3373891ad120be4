# SPDX-License-Identifier: Apache-2.0
"""Which quantized modules of a model are meant: patterns on their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from zo_kernels.nn._base import QuantModule


def chosen(model: nn.Module, names: Sequence[str], where: str) -> dict[str, QuantModule]:
    """The quantized modules that a pattern (`fnmatch`) matches, by name.

    Raises:
        TypeError: names is one string.
        ValueError: a pattern matches none; `where` is the name that the message begins with.
    """
    if isinstance(names, str):
        raise TypeError(
            f"{where}: names must be a sequence of patterns, got the string {names!r}; "
            "put it into a tuple"
        )
    modules = {n: m for n, m in model.named_modules() if isinstance(m, QuantModule)}
    for pattern in names:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(
                f"{where}: names must be patterns that match a quantized module, got "
                f"{pattern!r}, which matches none of {len(modules)}; compare it with "
                "model.named_modules(), and quantize the model first"
            )
    return {n: m for n, m in modules.items() if any(fnmatchcase(n, p) for p in names)}
