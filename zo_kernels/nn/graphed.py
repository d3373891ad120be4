# SPDX-License-Identifier: Apache-2.0
"""`Graphed`: evaluations of a model as CUDA graphs, also where it is `perturbed`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels.graphs import Graph, pool_of
from zo_kernels.kernels import _numbers
from zo_kernels.nn._base import QuantModule
from zo_kernels.ops._updates import int64

KEPT = 32  # kinds of calls; the one that was not used for longest goes


class Graphed:
    """`function(*inputs)`, which evaluates `model` without gradients, by replays of CUDA graphs.

        evaluate = Graphed(unet, lambda x, t, text: unet(x, t, text).sample)
        for step in range(steps):
            with torch.no_grad(), perturbed(unet, seed=7, draws=[step, step], coeffs=[eps, -eps]):
                plus, minus = evaluate(x.repeat(2, 1, 1, 1), t, text.repeat(2, 1, 1)).chunk(2)

    The first call of a kind runs as it is, which compiles what has to be compiled; the second is
    captured; from then on it is replayed. What may change from replay to replay: the values of the
    inputs, of the model's tensors where these lie, of the draws and coefficients of `perturbed`.
    Calls are of another kind where anything else of these is another: shape, strides and dtype of
    an input; the modules, their classes and mode, their hooks, the places and dtypes of their
    parameters and buffers; which modules are perturbed, and how; autocast.

    Hooks are told apart by equality. What is a function made anew makes each call one of a new
    kind, which runs as it is: give such a hook a class that compares what it does. All else that
    the function reads is frozen: numbers of Python, and tensors that are no parameters or buffers.

    On the CPU the same happens with the function in place of a graph, and where gradients are
    enabled the function alone runs. The capture itself needs a GPU: not yet confirmed on a GPU.

    Args:
        model: all of it on one device.
        function: takes tensors on that device and returns one. As `torch.cuda.graph` has it, it may
            not synchronize or copy from the host.

    Memory: of all kinds together what the largest needs, and the inputs and the output of each.

    Raises:
        ValueError: a call within `perturbed(inputs=True)`, whose factors are made anew for each
            block.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        self.model, self.function = model, function
        self._kinds: OrderedDict[Any, _Kind] = OrderedDict()
        self._pool: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """A tensor of its own; inputs may lie on the CPU."""
        if torch.is_grad_enabled():
            return self.function(*inputs)
        device = next(chain(self.model.parameters(), self.model.buffers())).device
        perturbations: dict[int, Mapping[str, Any]] = {}
        key = (
            *(device, torch.is_autocast_enabled(device.type)),
            *((x.shape, x.stride(), x.dtype) for x in inputs),
            *_frozen(self.model, perturbations),
        )
        numbers = list(perturbations.values())
        kind = self._kinds.get(key)
        if kind is None:
            if self._pool is None:
                self._pool = pool_of(device)
            kind = _Kind(self.function, inputs, numbers, device, self._pool)
            self._kinds[key] = kind
            if len(self._kinds) > KEPT:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(key)
        return kind.run(inputs, numbers)


def _frozen(model: nn.Module, perturbations: dict[int, Mapping[str, Any]]) -> list[Any]:
    """What of a model a graph has frozen.

    Args:
        perturbations: gets what the blocks of `perturbed` around the call say, one of each block.
    """
    found: list[Any] = []
    for module in model.modules():
        found += (module, type(module), module.training)
        found += module._forward_pre_hooks.values()
        found += module._forward_hooks.values()
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            found.append(None if tensor is None else (tensor.data_ptr(), tensor.dtype))
        if isinstance(module, QuantModule) and module.perturbation:
            if module.in_scales is not None:
                raise ValueError(
                    "Graphed: model must be perturbed with inputs=False, got input scales that are "
                    "perturbed as well; call the function itself"
                )
            how = dict(module.perturbation)
            block = how.pop("coeffs").data_ptr()  # `perturbed` makes one tensor for all modules
            perturbations.setdefault(block, module.perturbation)
            found += (list(perturbations).index(block), len(how.pop("draws")), *how.values())
    return found


class _Kind:
    """Calls that run the same kernels on the same memory."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        numbers: Sequence[Mapping[str, Any]],
        device: torch.device,
        pool: Any,
    ) -> None:
        self.function = function
        with torch.inference_mode(False):  # what is made so can be written in either mode
            self.inputs = [torch.zeros_like(x, device=device, requires_grad=False) for x in inputs]
            self.there = [
                (torch.zeros(count, device=device).long(), torch.zeros(count, device=device))
                for count in (len(how["draws"]) for how in numbers)
            ]
        self.numbers: Sequence[Mapping[str, Any]] = ()
        self.output = torch.empty(0)
        self.graph = Graph(device, self._evaluate, pool)

    def run(self, inputs: Sequence[Tensor], numbers: Sequence[Mapping[str, Any]]) -> Tensor:
        self.numbers = numbers
        # CUDA has staged what lies in pageable memory when a copy returns, and waits for nothing.
        for mine, x in zip(self.inputs, inputs, strict=True):
            mine.copy_(x, non_blocking=True)
        for (draws, coeffs), how in zip(self.there, numbers, strict=True):
            wrapped = [int64("Graphed", "draws", draw) for draw in how["draws"]]
            draws.copy_(torch.tensor(wrapped), non_blocking=True)
            coeffs.copy_(how["coeffs"], non_blocking=True)
        self.graph.run()
        return self.output.clone()  # another kind may write where it lies

    def _evaluate(self) -> None:
        with ExitStack() as blocks:
            for how, there in zip(self.numbers, self.there, strict=True):
                blocks.enter_context(_numbers.placed(how["coeffs"], there))
            self.output = self.function(*self.inputs)
