# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: torch's decompositions on the meta device call `torch.empty` for a device that a
    wrapper of it loses. Only the harness is tested, on kernels with tests of their own."""
