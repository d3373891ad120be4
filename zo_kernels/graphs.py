# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of functions that always run the same kernels on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Graph:
    """A function without arguments and results: run as it is, then captured, then replayed; on the
    CPU run each time.

    Not yet confirmed on a GPU.

    Args:
        device: on which the function runs.
        function: may not synchronize or copy from memory of the host that is not pinned. Python
            runs in it twice: numbers of Python are frozen, what changes lies in tensors.
        pool: `pool_of` the device, where graphs that never run at the same time share memory. What
            one of them has written there stays until the next one of them runs.

    Attributes:
        capturing: whether `run` is within the capture; still set where that raised.
    """

    def __init__(
        self, device: torch.device, function: Callable[[], None], pool: Any = None
    ) -> None:
        self.device, self.function, self.pool = device, function, pool
        self.capturing = False
        self._graph: Any = None
        self._warm = False
        self._kept: list[object] = []

    def run(self) -> bool:
        """Whether the host went through the function, and not the device alone."""
        if self.device.type != "cuda":
            self.function()
            return True
        if self._graph is not None:
            self._graph.replay()
            return False
        # Both on a stream of its own, as torch wants it.
        side, main = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        if not self._warm:
            side.wait_stream(main)
            with torch.cuda.stream(side):
                self.function()
            main.wait_stream(side)
            self._warm = True
            return True
        from zo_kernels.kernels import _table

        self.capturing, graph = True, torch.cuda.CUDAGraph()
        with _table.keeping() as self._kept, torch.cuda.graph(graph, self.pool, side):
            self.function()
        self.capturing, self._graph = False, graph
        graph.replay()
        return True


def pool_of(device: torch.device) -> Any:
    """Memory for graphs of `device` to share; None on the CPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
