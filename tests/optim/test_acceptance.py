# SPDX-License-Identifier: Apache-2.0
"""The faults that zeroth-order codes were found to have, one test for each, by number.

1 probe and update use one z, 2 streams are independent, 3 known answers, 4 an exception restores,
5 no drift, 6 replay, 7 the global random state, 8 odd tensors, 9 memory, 10 the sign of the update,
11 no bias, 12 resume, 13 ranks, 14 a quantized layer feels its perturbation. Those that are not
here: 3 test_noise_contract.py, 5 test_probes.py, 6 test_trajectory.py, 8 also test_huge.py,
9 test_memory.py, 11 test_unbiased.py, 12 test_state.py, 13 test_distributed.py.
"""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zo_kernels.nn import QuantLinear
from zo_kernels.optim import ZOSGD
from zo_kernels.quant import quantize_
from zo_kernels.rng import noise

PROBES = ["snapshot", "in_place", "virtual"]


def bits(*tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
@pytest.mark.parametrize("n", [1, 3])
def test_01_the_update_moves_along_the_probed_directions(probe, estimator, n):
    """The seen z of each draw, times its coefficient, is the change; also after a resume."""
    w = torch.zeros(64).requires_grad_()
    options = {"eps": 2.0**-6, "lr": 2.0**-8, "n": n, "estimator": estimator, "probe": probe}
    optimizer = ZOSGD([w], **options)
    for step in range(3):
        if step == 2:
            state = optimizer.state_dict()
            optimizer = ZOSGD([w], **options)
            optimizer.load_state_dict(state)
        before, seen, losses = w.detach().clone(), {}, []
        for evaluation in optimizer.probes():
            with evaluation:
                moved = w + 0.0 - before
                if evaluation.sign > 0:
                    seen[evaluation.draw] = moved / options["eps"]
                losses.append(len(losses) ** 2 + step)
        optimizer.tell(losses)
        [row] = optimizer._coefficients(losses)
        expected = -options["lr"] * sum(c * z for c, z in zip(row, seen.values(), strict=True))
        torch.testing.assert_close(w.detach() - before, expected, rtol=1e-3, atol=1e-4)


def test_02_streams_draws_and_steps_are_uncorrelated():
    """Same shape, neighbouring numbers: every pair within 5 standard errors of zero."""
    numel = 1 << 16
    for kind in ("normal", "rademacher"):
        rows = [
            noise(numel, seed=seed, draw=draw, stream=stream, kind=kind)
            for seed in (0, 1)
            for draw in (0, 1, 2)
            for stream in (0, 1, 2)
        ]
        rows.append(torch.roll(rows[0], 1))
        correlation = torch.stack(rows) @ torch.stack(rows).T / numel
        off_diagonal = correlation - torch.diag(correlation.diagonal())
        assert off_diagonal.abs().max() < 5 / numel**0.5


@pytest.mark.parametrize("probe", PROBES)
def test_04_an_exception_in_the_closure_leaves_the_exact_weights(probe):
    w = torch.randn(33, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = ZOSGD([w], lr=0.0, n=2, probe=probe)
    optimizer.step(lambda: w.sum())
    before = bits(w)

    def closure():
        if optimizer._round and (w + 0).sum() > -1e9:
            raise OSError("data loader")

    with pytest.raises(OSError, match="data loader"):
        optimizer.step(closure)
    assert bits(w) == before


@pytest.mark.parametrize("probe", PROBES)
def test_07_the_global_random_state_is_neither_read_nor_written(probe):
    results = []
    for seed in (0, 1):
        w = torch.ones(9).requires_grad_()
        optimizer = ZOSGD([w], lr=0.1, probe=probe)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        optimizer.step(lambda w=w: w.square().sum())
        assert torch.equal(torch.get_rng_state(), before)
        results.append(bits(w))
    assert results[0] == results[1]


@pytest.mark.parametrize("probe", PROBES)
def test_08_odd_tensors_train(probe):
    shapes = [torch.ones(()), torch.ones(0), torch.ones(5, 3).T, torch.ones(2, 4)[:, ::2]]
    params = [p.requires_grad_() for p in shapes]
    optimizer = ZOSGD([*params, params[0]], lr=0.01, seed=0, probe=probe)
    for _ in range(3):
        optimizer.step(lambda: sum(p.square().sum() for p in params))
    optimizer.step(lambda: float("nan"))
    assert optimizer.rejected == 1
    assert all(p.isfinite().all() for p in params) and not torch.equal(params[2], torch.ones(3, 5))


@pytest.mark.parametrize("probe", PROBES)
def test_10_the_loss_goes_down_not_up(probe):
    w = torch.full((50,), 3.0).requires_grad_()
    optimizer = ZOSGD([w], lr=0.002, probe=probe)
    losses = [optimizer.step(lambda: w.square().sum()) for _ in range(100)]
    assert losses[-1] < 0.75 * losses[0]


def test_14_a_quantized_layer_feels_the_perturbation_of_its_scales():
    """Through the op that runs, not only in a tensor that nobody reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    quantize_(model)
    [layer] = [m for m in model.modules() if isinstance(m, QuantLinear)]
    x, codes = torch.randn(4, 32), layer.codes().float()
    layer.scale.requires_grad_()
    optimizer = ZOSGD([layer.scale], lr=0.0, eps=1e-4)
    losses = []
    for evaluation in optimizer.probes():
        with evaluation:
            losses.append(model(x).square().mean())
            weight = codes * layer.scale[:, None]
            expected = F.linear(x, weight, layer.bias).square().mean()
            torch.testing.assert_close(losses[-1], expected)
    optimizer.tell(losses)
    assert losses[0] != losses[1]
