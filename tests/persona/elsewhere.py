# SPDX-License-Identifier: Apache-2.0
"""The meta device stands for a GPU: its tensors refuse to meet those of the CPU, too."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """What the host waits for: copies from the device, and copies to it that are not asked to go
    on. A number or a size that is read there is an error."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.ops.aten._to_copy.default:
            return func(*args, **kwargs)
        x, target = args[0], torch.device(kwargs.get("device") or args[0].device)
        if x.is_meta and target.type != "meta":
            self.found.append("from")
            return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        if not x.is_meta and target.type == "meta" and not kwargs.get("non_blocking"):
            self.found.append("to")
        return func(*args, **kwargs)


class Numbers(Waits):
    """The same, where numbers may be read: each is 1."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        with self:  # in inference mode `to` and `item` come as they are
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        return super().__torch_dispatch__(func, types, args, kwargs)
