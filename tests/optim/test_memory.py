# SPDX-License-Identifier: Apache-2.0
"""What a step takes beside the weights, as the operating system counts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Prints the growth of the resident set's peak in a second step, the first having warmed up.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from zo_kernels.optim import ZOSGD

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

options = json.loads(sys.argv[1])
dtype = getattr(torch, options.pop("dtype"))
params = [torch.full((25_000_000,), 0.5, dtype=dtype).requires_grad_() for _ in range(4)]
optimizer = ZOSGD(params, lr=1e-6, **options)
losses = iter([1.0, 2.0] * 8)
optimizer.step(lambda: next(losses))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
optimizer.step(lambda: next(losses))
print(status("VmHWM") - before)
"""


def extra(**options):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process can be reset on Linux only")
    command = [sys.executable, "-c", SCRIPT, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("keep", [False, True])
def test_a_step_over_100_m_weights_takes_less_than_8_mib(keep):
    assert extra(dtype="float32", probe="in_place", keep_perturbed=keep) < 8 * 2**20


def test_the_measurement_sees_a_copy():
    assert extra(dtype="bfloat16", probe="snapshot") > 50 * 2**20
