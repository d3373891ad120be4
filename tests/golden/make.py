# SPDX-License-Identifier: Apache-2.0
"""Write noise.json and rounding.json, the noise contract as bits, from the numpy implementation.

To be run once for a contract: the files stay when code changes. Logs of training runs are replayed
by regenerating their noise, so other bits here would break every log there is.

    python -m tests.golden.make
"""

import json
from pathlib import Path

from zo_kernels import rng

FILE = Path(__file__).with_name("noise.json")
ROUNDING = Path(__file__).with_name("rounding.json")

# The known answers of Random123 (Salmon et al., SC'11) for philox4x32-10: not computed here.
PHILOX = [
    {
        "counter": [0, 0, 0, 0],
        "key": 0,
        "words": ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"],
    },
    {
        "counter": [0xFFFFFFFF] * 4,
        "key": 0xFFFFFFFF_FFFFFFFF,
        "words": ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"],
    },
    {
        "counter": [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        "key": 0x299F31D0_A4093822,
        "words": ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
    },
]
# seed, draw, stream, offset
NOISE = [
    (0, 0, 0, 0),
    (42, 7, 3, 0),
    (-1, -1, 2**32 - 1, 61),
    (0x299F31D0_A4093822, 2**40 + 5, 1000, 10**9 + 1),
]
COUNT = 160  # elements: more than a group of either kind


def main() -> None:
    noise = [
        {"kind": kind, "seed": seed, "draw": draw, "stream": stream, "offset": offset, "bits": bits}
        for kind in rng.KINDS
        for seed, draw, stream, offset in NOISE
        for z in [
            rng.noise_numpy(COUNT, seed=seed, draw=draw, stream=stream, kind=kind, offset=offset)
        ]
        for bits in [[f"{word:08x}" for word in z.view("uint32").tolist()]]
    ]
    FILE.write_text(json.dumps({"philox": PHILOX, "noise": noise}, indent=1) + "\n")
    rounding = [
        {"seed": seed, "draw": draw, "stream": stream, "offset": offset, "bits": bits}
        for seed, draw, stream, offset in NOISE
        for r in [rng.round_bits_numpy(COUNT, seed=seed, draw=draw, stream=stream, offset=offset)]
        for bits in [[f"{word:04x}" for word in r.tolist()]]
    ]
    ROUNDING.write_text(json.dumps(rounding, indent=1) + "\n")


if __name__ == "__main__":
    main()
