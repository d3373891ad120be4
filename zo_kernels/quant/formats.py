# SPDX-License-Identifier: Apache-2.0
"""Spec strings: how a weight is stored. `w<bits>[a<bits>][g<group>]` names the weight bits, the
bits that activations are rounded to (none: they keep their dtype), and the input columns that share
a scale (none: one scale per output channel).

| spec | codes | scale | activations |
|---|---|---|---|
| `w8` | int8 in [-127, 127], shape of the weight | fp32, one per output channel | their dtype |
"""

W8 = "w8"
SPECS = (W8,)


def check_spec(spec: str, where: str) -> None:
    """Raise ValueError, in the name of `where`, unless this version can store `spec`."""
    if spec not in SPECS:
        raise ValueError(
            f"{where}: spec must be one of {', '.join(SPECS)}, got {spec!r}; "
            "choose a format that this version stores"
        )
