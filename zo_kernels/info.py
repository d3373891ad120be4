# SPDX-License-Identifier: Apache-2.0
"""`python -m zo_kernels.info`: what is installed, and which backend of which op can run here."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from zo_kernels import __version__, _env, _native


@dataclass(frozen=True)
class Cell:
    """One backend of one op.

    Attributes:
        op: its name in `torch.ops.zo_kernels`.
        backend: "reference", "cpp" or "triton".
        device: the device type where it runs, or "any".
        reason: None if it can run here, else why not.
    """

    op: str
    backend: str
    device: str
    reason: str | None


def versions() -> dict[str, str]:
    """Of this package and those it computes with; "not installed" where one is missing."""
    return {"zo_kernels": __version__} | {n: _version(n) for n in ("torch", "triton", "numpy")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def native() -> dict[str, str]:
    """The C++ part: how it was built, the CPU instruction sets it has, and the one in use.

    Raises:
        ValueError: ZO_CPU_ISA names an instruction set that is unknown or that the CPU lacks.
    """
    override = {"ZO_CPU_ISA": _env.cpu_isa()}
    module = _native.binding()
    if module is None:
        return {"C++": _native.NOT_BUILT} | override
    built = {name: str(value) for name, value in module.build_info().items()}
    available = ", ".join(module.cpu_isas_available())
    return built | {"isa in use": module.cpu_isa(), "isas available": available} | override


def matrix() -> list[Cell]:
    """Every op with every backend that it has; whether arguments suit it is asked at each call.

    Raises:
        ModuleNotFoundError: torch is not installed.
    """
    import zo_kernels.ops  # noqa: F401  (declares them)
    from zo_kernels._registry import OPS, REFERENCE

    cells = []
    for name, op in sorted(OPS.items()):
        cells.append(Cell(name, REFERENCE, "any", None))
        cells += [Cell(name, b.name, b.device, b.available()) for b in op.backends]
    return cells


def report() -> str:
    """All of it as text."""
    pairs = [*versions().items(), *native().items(), ("ZO_BACKEND", _env.backend())]
    lines = _aligned(pairs)
    if _version("torch") == "not installed":
        return "\n".join([*lines, "", "ops need torch"])
    cells = [(c.op, c.backend, c.device, c.reason or "can run") for c in matrix()]
    return "\n".join([*lines, "", *_aligned([("op", "backend", "device", "here"), *cells])])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
