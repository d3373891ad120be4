# SPDX-License-Identifier: Apache-2.0
"""Many tensors in one launch of a Triton kernel: what is launched, where each program works, and
which tables are kept."""

from types import SimpleNamespace

import pytest
import torch

from zo_kernels import rng
from zo_kernels.ops.add_noise import add_noise_ref
from zo_kernels.ops.zo_adam import zo_adam_ref
from zo_kernels.testing import assert_same_bits

pytest.importorskip("triton")
checks = pytest.importorskip("triton_checks")
from zo_kernels.kernels import _table  # noqa: E402
from zo_kernels.kernels.add_noise import add_noise__triton  # noqa: E402
from zo_kernels.kernels.zo_adam import zo_adam__triton  # noqa: E402

TILE = 1024


@pytest.fixture(autouse=True)
def no_tables():
    _table._tables.clear()
    yield
    _table._tables.clear()


def one(kind="rademacher", draws=(0,)):
    return 1, list(draws), torch.ones(len(draws)), torch.tensor(0.5), kind


def parts(params, quanta=None):
    quanta = [0.0] * len(params) if quanta is None else quanta
    return _table.parts(params, (), list(range(len(params))), quanta, TILE)


def test_a_thousand_tensors_are_one_launch(monkeypatch, tmp_path):
    params = [torch.zeros(1 + i % 70) for i in range(1000)]
    with checks.compiling("sm_90", monkeypatch, tmp_path) as kernels:
        add_noise__triton(params, list(range(1000)), *one())
    assert len(kernels) == 1
    (part,) = parts(params)
    assert len(part.chunks) == 1000 and part.aligned and not part.grid


def test_a_launch_for_what_needs_a_kernel_of_its_own(monkeypatch, tmp_path):
    params = [torch.zeros(64), torch.zeros(64).half(), torch.zeros(65)[1:], torch.zeros(64)]
    grids = [0.0, 0.0, 0.0, 2.0**-20]
    with checks.compiling("sm_90", monkeypatch, tmp_path) as kernels:
        add_noise__triton([*params, torch.zeros(9)], [0, 1, 2, 3, 4], *one(), torch.zeros(5))
        add_noise__triton(params, [0, 1, 2, 3], *one(), torch.tensor(grids))
    assert len(kernels) == 3 + 4
    found = {(p.dtype, p.grid, p.aligned): len(p.chunks) for p in parts(params, grids)}
    fp32, half = torch.float32, torch.float16
    assert found == {
        (fp32, False, True): 1,
        (half, False, True): 1,
        (fp32, False, False): 1,
        (fp32, True, True): 1,
    }


@pytest.mark.parametrize("elements", [1, 1024, 1025, 10**6, 860 * 10**6, 2**34])
def test_chunks_cover_every_tile_once(elements):
    large = SimpleNamespace(
        numel=lambda: elements, dtype=torch.float16, data_ptr=lambda: 0, device="cpu"
    )
    (part,) = parts([large, torch.ones(3).half()])
    tiles = -(-elements // TILE)
    rows, first = part.chunks >> 32, part.chunks & 0xFFFFFFFF
    assert torch.equal(first[rows == 0], torch.arange(0, tiles, part.tiles))
    assert first[rows == 1].tolist() == [0]
    assert part.tiles <= _table.LONGEST and part.tiles & (part.tiles - 1) == 0
    assert len(part.chunks) <= 2 * _table.CHUNKS + 2 or part.tiles == _table.LONGEST
    assert (part.chunks.numel() + part.rows.numel()) * 8 <= max(2**20, elements // 2**10)


@checks.quiet
@pytest.mark.interpreter
@pytest.mark.parametrize("kind", rng.KINDS)
def test_programs_of_several_tiles(kind, monkeypatch, rounded):
    """Of mixed dtypes, aligned or not, on a grid or not, one of no elements."""
    monkeypatch.setattr(_table, "CHUNKS", 1)
    monkeypatch.setattr(_table, "LONGEST", 2)
    sizes = {9000: torch.float32, 0: torch.float32, 5000: torch.bfloat16, 130: torch.float32}

    def made(dtype=None):
        return [torch.linspace(-1, 1, n).to(dtype or own) for n, own in sizes.items()]

    grids = torch.tensor([2.0**-20, 2.0**-20, 0.0, 0.0])
    rest = (5, [3, 3, -1], torch.tensor([1e-3, 0.5, -1.0]))
    got, wanted = made(), made()
    add_noise__triton(got, [7, 8, 9, 2**32 - 1], *rest, torch.tensor(0.9), kind, grids, -77)
    add_noise_ref(wanted, [7, 8, 9, 2**32 - 1], *rest, torch.tensor(0.9), kind, grids, -77)
    for x, y in zip(got, wanted, strict=True):
        assert_same_bits(x, y)
    assert max(part.tiles for part in next(iter(_table._tables.values()))) == 2

    hyper = torch.tensor([0.1, 0.999, 1e-3, 500.0, 1e-3, -5e-3, 0.99])
    states = [(made(torch.float32), [x * x for x in made(torch.float32)]) for _ in range(2)]
    streams = [1, 2, 3, 4]
    zo_adam__triton(got, *states[0], streams, *rest, hyper, kind, None, 5)
    zo_adam_ref(wanted, *states[1], streams, *rest, hyper, kind, None, 5)
    for xs, ys in zip((got, *states[0]), (wanted, *states[1]), strict=True):
        for x, y in zip(xs, ys, strict=True):
            assert_same_bits(x, y)


@checks.quiet
@pytest.mark.interpreter
def test_numbers_of_the_device(rounded):
    """Draws count from a base: a launch that has frozen all else perturbs anew."""
    params, wanted = ([torch.linspace(-1, 1, 300).bfloat16()] for _ in range(2))
    base, draws = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 2, -50])
    for first in (5, 2**40):
        base.fill_(first)
        rest = (torch.tensor([1e-2, 2.0]), torch.tensor(0.9), "normal", None)
        add_noise__triton(params, [3], 1, [0, 2], *rest, -50, at=(base, draws))
        add_noise_ref(wanted, [3], 1, [first, first + 2], *rest, first - 50)
        assert_same_bits(params[0], wanted[0])


def test_a_table_is_found_again():
    params = [torch.zeros(5), torch.zeros(7)]
    assert parts(params) is parts(params)
    assert parts([x.detach() for x in params]) is parts(params)  # other objects, same memory


def test_whatever_a_table_says_is_in_its_key():
    x, y = torch.zeros(64), torch.zeros(64)
    quanta, state = [0.5], torch.zeros(64)
    calls = [
        ([x], [], [0], [0.0], TILE),
        ([y], [], [0], [0.0], TILE),
        ([x[:5]], [], [0], [0.0], TILE),
        ([x.view(torch.int32).view(torch.bfloat16)[:64]], [], [0], [0.0], TILE),
        ([x], [[state]], [0], [0.0], TILE),
        ([x], [[state], [y]], [0], [0.0], TILE),
        ([x], [], [1], [0.0], TILE),
        ([x], [], [0], quanta, TILE),
        ([x], [], [0], [0.0], 2 * TILE),
        ([x, y], [], [0, 1], [0.0, 0.0], TILE),
    ]
    made = [_table.parts(*call) for call in calls]
    assert len({id(m) for m in made}) == len(calls)
    for call, found in zip(calls, made, strict=True):
        assert _table.parts(*call) is found


def test_few_tables_are_kept_and_a_keeper_holds_what_it_saw():
    params = [torch.zeros(8) for _ in range(_table.KEPT + 3)]
    with _table.keeping() as seen:
        first = parts(params[:1])
    for p in params:
        parts([p])
    assert len(_table._tables) == _table.KEPT
    assert seen == [first] and parts(params[:1]) is not first


def test_a_table_that_a_graph_makes_is_the_graphs_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with _table.keeping() as seen:
        made = parts([torch.zeros(8)])
    assert not _table._tables
    assert seen[1] is made and isinstance(seen[0], torch.Tensor)  # and what it is copied from


@pytest.mark.slow
def test_interpreter():
    """Runs the test above that is marked so, in a process whose Triton interprets."""
    assert checks.interpreted(__file__) == 3
