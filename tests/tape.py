# SPDX-License-Identifier: Apache-2.0
"""A CUDA graph for the CPU: the calls of ops, with the tensors and numbers that they had.

A replay runs them again on the same memory. What Python read is frozen, as in a graph; so are draws
and coefficients of perturbed products, but where `_numbers.placed` said that they lie elsewhere:
these are read anew, as the Triton kernels read them.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zo_kernels.graphs import Graph
from zo_kernels.kernels import _numbers


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out, self._there(func, args)))
        return out

    @staticmethod
    def _there(func, args):
        """Where a perturbed product finds its draws and coefficients: index in `args` -> tensor."""
        names = [argument.name for argument in func._schema.arguments]
        if func.namespace != "zo_kernels" or "coeffs" not in names:
            return {}
        at = [names.index(name) for name in ("draws", "coeffs")]
        if len(args) <= at[1] or args[at[1]] is None:  # defaults at the end are left out
            return {}
        return dict(zip(at, _numbers.on_device(*(args[i] for i in at), "cpu"), strict=True))

    def replay(self):
        for func, args, kwargs, out, there in self.calls:
            now = list(args)
            for i, value in there.items():
                now[i] = value.tolist() if value.dtype == torch.int64 else value
            again = func(*now, **kwargs)
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class TapedGraph(Graph):
    """Run as it is, then taped, then replayed."""

    def run(self):
        if self._graph is not None:
            self._graph.replay()
            return False
        if not self._warm:
            self.function()
            self._warm = True
            return True
        self._graph = Tape()
        with self._graph:
            self.function()
        return True
