# SPDX-License-Identifier: Apache-2.0
"""Imports go one way, need neither torch nor a device where they should not, and survive no C++."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zo_kernels

PACKAGE = Path(zo_kernels.__file__).parent
ROOT = PACKAGE.parent
# A module may import what stands in a later row, and its own row.
LAYERS = (
    ("persona",),
    ("zo_kernels.testing", "zo_kernels.info", "zo_kernels.replay"),
    (
        "zo_kernels.optim",
        "zo_kernels.nn",
        "zo_kernels.quant",
        "zo_kernels.estimators",
        "zo_kernels.distributed",
    ),
    ("zo_kernels.ops", "zo_kernels.graphs"),
    ("zo_kernels._registry",),
    ("zo_kernels.kernels",),
    ("zo_kernels.updates_numpy",),
    ("zo_kernels._arithmetic",),
    ("zo_kernels.rng", "zo_kernels._native", "zo_kernels.packing"),
    ("zo_kernels._env", "zo_kernels._C", "zo_kernels._xp"),
    ("zo_kernels",),
)
FILES = sorted([*(ROOT / "persona").rglob("*.py"), *PACKAGE.rglob("*.py")])


def layer(module):
    for depth, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return depth
    raise AssertionError(f"{module} stands in no layer")


def module_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                # `from zo_kernels import rng` imports a module, most others a name out of one.
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if node.module == "zo_kernels" else node.module


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_go_one_way(file):
    here = layer(module_of(file))
    for line, name in imported(ast.parse(file.read_text())):
        if name.split(".")[0] in ("persona", "zo_kernels"):
            assert layer(name) >= here, f"{file}:{line} imports {name}"


def run(code, cwd=ROOT):
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_does_not_import_torch():
    run(
        "import sys, zo_kernels, zo_kernels.rng\n"
        "zo_kernels.rng.noise_numpy(3, seed=1, draw=0, stream=0)\n"
        "assert 'torch' not in sys.modules"
    )


def test_no_device_call_at_import():
    run(
        "import sys, torch\n"
        "def refuse(*_): raise AssertionError('asked for a device')\n"
        "for name in ('is_available', 'device_count', 'current_device', '_lazy_init'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "torch._C._cuda_getDeviceCount = refuse\n"
        "import zo_kernels.ops, zo_kernels.optim, zo_kernels.nn, zo_kernels.quant\n"
        "assert 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()"
    )


BITS = """
import sys, torch
if {hidden!r}: sys.modules[{hidden!r}] = None
import zo_kernels
from zo_kernels._registry import cpp_available, use_backend
from zo_kernels.ops import add_noise_
p = torch.linspace(-1, 1, 1000).bfloat16()
add_noise_([p], [1], 5, [0, 9], [0.5, 0.25], 0.9)
add_noise_([p], [2], 5, [0, 9], [0.5, 0.25], 0.9, "rademacher")
print(zo_kernels.__file__, cpp_available(), p.view(torch.int16).tolist(), sep="|")
"""


def test_pure_python_installation(tmp_path):
    """Without the compiled files and without Triton: the same bits, and it says what is missing."""
    keep = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "zo_kernels", ignore=keep)
    where, missing, bits = run(BITS.format(hidden="triton"), tmp_path).split("|")
    assert Path(where).is_relative_to(tmp_path)
    assert missing.startswith("not built at install time")
    assert bits == run(BITS.format(hidden="")).split("|")[2]
