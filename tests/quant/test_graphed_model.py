# SPDX-License-Identifier: Apache-2.0
"""`Graphed`: replays of a model's evaluation have the bits of the evaluation itself."""

from contextlib import nullcontext

import pytest
import torch
from tape import TapedGraph
from torch import nn

from zo_kernels.nn import Graphed, graphed, perturbed, set_scales_, trainable_scales
from zo_kernels.quant import quantize_

DEVICES = ["cpu", "taped"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where a model lies; "taped": on the CPU, with a tape in place of the graph."""
    if request.param == "taped":
        monkeypatch.setattr(graphed, "Graph", TapedGraph)
        return "cpu"
    return request.param


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(24, 16), nn.Linear(16, 8)
        for p in self.parameters():
            p.requires_grad_(False).uniform_(-1, 1, generator=generator)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def made(device, quantized=True):
    model = Model().to(device)
    if quantized:
        quantize_(model)
    return model, Graphed(model, lambda x: model(x))


def inputs(device, *shape):
    shape = shape or (4, 24)
    for step in range(5):
        yield torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(device)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("quantized", [True, False])
def test_inputs_and_weights_change_in_place(device, quantized, mode):
    model, evaluate = made(device, quantized)
    with mode():
        for x in inputs(device):
            model.second.bias += 0.5
            assert evaluate(x).equal(model(x))
    assert len(evaluate._kinds) == 1


@pytest.mark.parametrize("what", ["scale", "scale_relative", "weight", "codes"])
def test_draws_and_coefficients_change(device, what):
    model, evaluate = made(device)
    for module in (model.first, model.second):
        module.set_codes(module.codes().clamp(-120, 120), module.scale)
    results = []
    with torch.no_grad():
        for step, x in enumerate(inputs(device)):
            coeffs = [1 + step, -1] if what == "codes" else [0.1 + step, -0.1]
            with perturbed(model, seed=3, draws=[step, 2**64 - 1 - step], coeffs=coeffs, what=what):
                results.append(evaluate(x))
                assert results[-1].equal(model(x))
    assert len(evaluate._kinds) == 1
    assert len({y.sum().item() for y in results}) == 5


def test_blocks_of_their_own(device):
    """Two layers, each in a block of `perturbed` of its own."""
    model, evaluate = made(device)
    with torch.no_grad():
        for step, x in enumerate(inputs(device)):
            first = perturbed(model, seed=1, draws=[step], coeffs=[0.1], names=["first"])
            second = perturbed(model, seed=2, draws=[7, step], coeffs=[step, 0.2], names=["second"])
            with first, second:
                assert evaluate(x).equal(model(x))
    assert len(evaluate._kinds) == 1


class Hook:
    """Two of them are never equal."""

    def __call__(self, module, args, output):
        return output + 1


def moved(model):
    set_scales_(model, {"first.scale": model.first.scale * 2})


def retyped(model):
    model.second.bias.data = model.second.bias.data.double()


def subclassed(model):
    model.first.__class__ = type("Other", (type(model.first),), {})


def replaced(model):
    model.second = nn.Linear(16, 8, device=model.first.scale.device)


CHANGES = {
    "hook": lambda model: model.first.register_forward_hook(Hook()),
    "scale": moved,
    "dtype": retyped,
    "class": subclassed,
    "mode": lambda model: model.eval(),
    "module": replaced,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_has_frozen_makes_another_kind(device, change):
    model, evaluate = made(device)
    with torch.no_grad():
        for i, x in enumerate(inputs(device)):
            if i == 3:
                CHANGES[change](model)
            assert evaluate(x).equal(model(x))
    assert len(evaluate._kinds) == 2


def test_other_inputs_and_perturbations_are_other_kinds(device):
    model, evaluate = made(device)
    noise = {"seed": 1, "draws": [0, 1], "coeffs": [0.5, -0.5]}
    ways = [None, noise, noise | {"seed": 2}, noise | {"what": "scale_relative"}]
    ways += [noise | {"kind": "normal"}, noise | {"draws": [1], "coeffs": [0.5]}]
    with torch.no_grad():
        for _ in range(4):
            for x in (torch.ones(4, 24), torch.ones(2, 24), torch.ones(24, 4).t()):
                x = x.to(device)
                assert evaluate(x).equal(model(x))
            for way in ways[1:]:
                with perturbed(model, **way):
                    assert evaluate(x).equal(model(x))
    assert len(evaluate._kinds) == 3 + 5


def test_a_result_is_the_callers_own(device):
    model, evaluate = made(device)
    with torch.no_grad():
        kept = [(evaluate(x), model(x)) for x in inputs(device)]
    assert all(y.equal(wanted) for y, wanted in kept)


def test_inference_and_no_grad_take_turns(device):
    model, evaluate = made(device)
    for i, x in enumerate(inputs(device)):
        with torch.inference_mode() if i % 2 == 0 else torch.no_grad():
            assert evaluate(x).equal(model(x))
    assert len(evaluate._kinds) == 1


def test_gradients_are_those_of_the_function(device):
    model, evaluate = made(device)
    scales = trainable_scales(model)
    x = torch.ones(2, 24, device=device)
    evaluate(x).sum().backward()
    assert scales["first.scale"].grad is not None and not evaluate._kinds


def test_few_kinds_are_kept(device, monkeypatch):
    monkeypatch.setattr(graphed, "KEPT", 2)
    model, evaluate = made(device)
    with torch.no_grad():
        for size in (1, 2, 3, 1, 3, 3, 3):
            x = torch.ones(size, 24, device=device)
            assert evaluate(x).equal(model(x))
    assert len(evaluate._kinds) == 2


def test_perturbed_input_scales_are_refused(device):
    model, evaluate = made(device)
    trainable_scales(model, ("in_scale",))
    noise = perturbed(model, seed=1, draws=[0], coeffs=[0.1], inputs=True)
    refusal = pytest.raises(ValueError, match="must be perturbed with inputs=False")
    with torch.no_grad(), noise, refusal:
        evaluate(torch.ones(2, 24, device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there a graph reads its own numbers")
def test_a_tape_freezes_what_nobody_placed(monkeypatch):
    """That the tape tells: without `placed` draws stay those of the capture."""
    monkeypatch.setattr(graphed, "Graph", TapedGraph)
    monkeypatch.setattr(graphed._numbers, "placed", lambda *_: nullcontext())
    model, evaluate = made("cpu")
    right = []
    with torch.no_grad():
        for step, x in enumerate(inputs("cpu")):
            with perturbed(model, seed=3, draws=[step], coeffs=[0.5], kind="normal"):
                right.append(evaluate(x).equal(model(x)))
    assert right == [True, True, False, False, False]
