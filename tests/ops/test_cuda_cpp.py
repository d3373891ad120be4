# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels of the update ops without a GPU: their code, compiled for the host, has the
bits of the reference, and nvcc compiles every file of CUDA C++ without a spill."""

import copy
import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from cuda_checks import FLAGS, SOURCES, host_twin

from zo_kernels import _native, rng
from zo_kernels._registry import OPS
from zo_kernels.ops._updates import DTYPES
from zo_kernels.testing import SIZES, assert_same_bits

pytest.importorskip("triton")
from zo_kernels.kernels import _table, _updates
from zo_kernels.kernels.add_noise import add_noise__triton

NAMES = ("add_noise_", "zo_sgd_", "zo_adam_")
KERNELS = {"add_noise": 12, "qlinear": 8, "zo_adam": 12, "zo_sgd": 12}  # of a file
FILES = sorted((SOURCES / "cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return host_twin("host_twin", tmp_path_factory.mktemp("twin")).zo_update


def run(twin, name, params, states, streams, seed, draws, factors, hyper, kind, quanta, round_draw):
    """As the launcher does: one call for each part of the table."""
    tile = _updates.BLOCKS[kind] * rng.GROUP[kind] // rng.BLOCKS_PER_GROUP[kind]
    base, where = torch.tensor([9]), torch.tensor([d - 9 for d in (*draws, round_draw or 9)])
    for part in _table.parts(params, states, streams, quanta, tile):
        numbers = torch.tensor([
            *(len(part.chunks), tile, part.tiles, len(draws), seed, rng.KINDS.index(kind)),
            *(DTYPES.index(part.dtype), part.grid),
            *(part.dtype != torch.float32 and round_draw is not None, part.aligned, True),
            bool(states),
        ])  # fmt: skip
        tensors = (part.rows, part.chunks, base, where, factors, hyper, numbers)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        twin(NAMES.index(name), *pointers)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_host_twin_has_the_bits_of_the_reference(twin, name, kind, aligned, monkeypatch):
    """Every dtype, on a grid or not, rounded at random or not, programs of several tiles."""
    monkeypatch.setattr(_table, "CHUNKS", 3)
    skip = 0 if aligned else 1
    sizes = (*SIZES, 0, 20_000)

    def made(dtype):
        return [torch.linspace(-1, 1, n + skip).to(dtype)[skip:] for n in sizes]

    hyper = {"add_noise_": [0.9], "zo_sgd_": [0.9, -0.5, 0.99]}
    hyper = torch.tensor(hyper.get(name, [0.1, 0.999, 1e-3, 500.0, 1e-3, -5e-3, 0.99]))
    draws, factors = [2**40 + 3, 2**40 + 3, -7], torch.tensor([1e-3, -2.0, 0.5])
    streams = [0, 1, 2**31, 2**32 - 1, 5, 6, 7, 8]
    for dtype in DTYPES:
        for round_draw in (None, -(2**40)):
            count = {"add_noise_": 0, "zo_sgd_": 1, "zo_adam_": 2}[name]
            params, states = made(dtype), [[x.abs() for x in made(torch.float32)]] * count
            states = copy.deepcopy(states)
            grid = [2.0**-20 * (dtype == torch.float32 and i % 2) for i in range(len(sizes))]
            wanted = copy.deepcopy((params, *states))
            shape = hyper.reshape(()) if name == "add_noise_" else hyper
            sign = [True] if name == "zo_sgd_" else []
            rest = (kind, torch.tensor(grid), round_draw)
            OPS[name].reference(*wanted, streams, -5, draws, factors, shape, *sign, *rest)
            run(
                *(twin, name, params, states, streams, -5, draws, factors, hyper),
                *(kind, grid, round_draw),
            )
            for xs, ys in zip((params, *states), wanted, strict=True):
                for x, y in zip(xs, ys, strict=True):
                    assert_same_bits(x, y)


def test_every_half_is_rounded_at_random_alike(twin):
    for dtype in DTYPES[1:]:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        finite = every[every.isfinite()]
        for factor in (1 / 3, 2.0**-13, 1.7):
            got, wanted = finite.clone(), finite.clone()
            hyper, none = torch.tensor([factor]), torch.ones(0)
            run(twin, "add_noise_", [got], [], [1], 5, [], none, hyper, "rademacher", [0.0], 77)
            OPS["add_noise_"].reference(
                *([wanted], [1], 5, [], none, torch.tensor(factor), "rademacher", None, 77)
            )
            assert_same_bits(got, wanted)


@pytest.mark.skipif(_native.load_cuda() is None, reason="the CUDA C++ kernels were built")
def test_asked_for_and_not_built_is_an_error(monkeypatch):
    monkeypatch.setenv("ZO_CUDA_CPP", "1")
    rest = ([0], 1, [], torch.ones(0), torch.tensor(1.0), "normal")
    with pytest.raises(RuntimeError, match="ZO_CUDA_CPP: the CUDA C\\+\\+ kernels must be there"):
        add_noise__triton([torch.ones(3)], *rest)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name, monkeypatch):
    """The bits of the reference, launched by the op itself; compute-sanitizer runs this."""
    if (why := _native.load_cuda()) is not None:
        pytest.skip(why)
    monkeypatch.setenv("ZO_CUDA_CPP", "1")
    for args in OPS[name].examples():
        if not all(p.is_contiguous() for p in args[0]):
            continue
        wanted = copy.deepcopy(args)
        got = tuple([x.cuda() for x in a] if _tensors(a) else a for a in copy.deepcopy(args))
        OPS[name].reference(*wanted)
        OPS[name](*got)
        for xs, ys in zip(got, wanted, strict=True):
            for x, y in zip(xs, ys, strict=True) if _tensors(xs) else ():
                assert_same_bits(x.cpu(), y)


def _tensors(value):
    return isinstance(value, list) and value and isinstance(value[0], torch.Tensor)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nvcc_compiles_without_a_spill(file, tmp_path):
    """For sm_80 and sm_90a, with no header of torch."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
    flags = [*FLAGS, "-O3", "--fmad=false", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command = ["nvcc", *flags, *targets, "-c", file, "-o", tmp_path / "kernel.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert len(spilled) == 2 * 2 * KERNELS[file.stem] and not any(map(int, spilled)), done.stderr


def test_there_is_a_file_for_each_op():
    assert [file.stem for file in FILES] == list(KERNELS)
    assert {f"{stem}_" for stem in KERNELS} - set(NAMES) == {"qlinear_"}
