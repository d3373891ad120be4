# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from colored_subjects import COLORS, STYLES, picture


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: torch's decompositions on the meta device call `torch.empty` for a device that a
    wrapper of it loses. Only the harness is tested, on kernels with tests of their own."""


@pytest.fixture
def subjects_file(tmp_path):
    """An .npz of three subjects with its .jsonl."""
    images, lines = [], []
    for name, color in COLORS.items():
        for i, style in enumerate(STYLES):
            images.append(np.asarray(picture(tuple(max(0, c - i) for c in color))))
            record = {"caption": name, "style": style, "keywords": [name, "red flower", "plant"]}
            lines.append(json.dumps(record))
    np.savez(tmp_path / "few.npz", images=np.stack(images))
    (tmp_path / "few.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "few.npz"
