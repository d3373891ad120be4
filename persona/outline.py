# SPDX-License-Identifier: Apache-2.0
"""A model without values, and the count of what it would hold.

A method runs on it as on another device, torch's meta device, and allocates there what it would.
`Ledger` sees every operation and counts the bytes of the tensors that are alive. What the ops of
`zo_kernels` take within a call it does not see: kilobytes.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from persona.base import check_model, precision
from persona.config import RunConfig
from persona.embedding import halve_embeddings_
from persona.families import StableDiffusion, at_a_time, model_folder
from persona.fused import fuse_
from persona.parts import Parts
from zo_kernels.nn import QuantModule
from zo_kernels.quant import quantize_empty_
from zo_kernels.quant.convert import model_bytes

META = torch.device("meta")
_FLOATS = 2  # of a layer that is read: its values in fp32, and what rounding makes of them
_aten: Any = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Bytes of the tensors that are made within it and alive, and their highest sum.

    Where a program asks a tensor on the meta device for values, they are zeros, and true.

    Args:
        host: count tensors on the CPU as well.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, host: bool = True) -> None:
        super().__init__()
        self.host = host
        self.now = self.peak = 0
        self._alive: set[int] = set()  # addresses of storages

    @contextmanager
    def part(self, name: str, peaks: dict[str, int]) -> Iterator[None]:
        """The block, its peak noted in ``peaks``."""
        self.peak = self.now
        yield
        peaks[name] = self.peak

    def reach(self, more: int) -> None:
        """So many bytes beside what is alive, for a moment."""
        self.peak = max(self.peak, self.now + more)

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor as long as it lives; one that is counted already stays so."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive and (self.host or tensor.is_meta):
            self._alive.add(address)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._let_go, address, storage.nbytes())
            self.reach(0)

    def _let_go(self, address: int, size: int) -> None:
        self._alive.remove(address)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):  # still whole in inference mode
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = _without_values(func, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
        return out


def _without_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation returns, also where it would read values that are not there."""
    x, *others = args if args and isinstance(args[0], Tensor) else (None,)
    if func is _aten._local_scalar_dense.default and x.is_meta:
        return True if x.dtype == torch.bool else 0
    if func is _aten._to_copy.default and x.is_meta and kwargs.get("device") == torch.device("cpu"):
        return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
    if func is _aten.copy_.default and others[0].is_meta and not x.is_meta:
        return x.zero_()
    return func(*args, **kwargs)


class FlashAttention(TorchFunctionMode):
    """Attention without its matrix, as every device has it, but for the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        flash = func is F.scaled_dot_product_attention
        return (_flash_attention if flash else func)(*args, **(kwargs or {}))


def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    op = _aten._scaled_dot_product_flash_attention_for_cpu
    return op(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@dataclass(frozen=True)
class OutlineParts(Parts):
    """`Parts` that read no weights.

    Attributes:
        ledger: told what reading them would hold.
    """

    ledger: Ledger

    def load(self, name: str) -> Any:
        config = self.precision.get(name)
        with _disable_current_modes():
            model = self.empty(name).requires_grad_(False).eval().to(META)
            rounded = [] if config is None else list(quantize_empty_(model, config).quantized)
            if config is not None:
                fuse_(model)
        if config is None:
            self.ledger.reach(model_bytes(model) + self._mapped(name))
        self._read(model, rounded)
        for tensor in (*model.parameters(), *model.buffers()):
            self.ledger.hold(tensor)
        if config is not None and name == "text_encoder":
            halve_embeddings_(model)
        return model

    def _read(self, model: nn.Module, rounded: list[str]) -> None:
        """Layer by layer: integers so far, and one in floats."""
        so_far = 0
        for name in rounded:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantModule)
            self.ledger.reach(so_far + _FLOATS * 4 * layer.weight.numel())
            so_far += model_bytes(layer)

    def _mapped(self, name: str) -> int:
        """Bytes of its files: a reader of whole models maps them."""
        folder = self.folder / name
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class Outline(StableDiffusion):
    """A model without values, of which pictures can be drawn."""

    @classmethod
    def of(cls, config: RunConfig, ledger: Ledger) -> Self:
        """Of the model that ``config`` names.

        Raises:
            UserError: what `persona.base.open_base` raises.
        """
        folder = model_folder(config.pretrained_model_name_or_path)
        parts = OutlineParts(folder, precision(config), META, ledger)
        with _disable_current_modes():  # the frames of the models stay no longer than this block
            family = cls.in_parts(parts)
        check_model(config, family)
        return family

    def sample_latents(
        self, prompts: list[str], *, guidance: float, batch: int | None = None, **_: Any
    ) -> Tensor:
        """One evaluation of those that a picture takes: they hold the same."""
        config = self.need("unet", "text_encoder").unet.config
        size = min(len(prompts), batch or at_a_time(config.sample_size**2))
        shape = (size, config.in_channels, config.sample_size, config.sample_size)
        copies = 2 if guidance > 1 else 1  # with the prompt and without
        with torch.inference_mode():
            latents = torch.zeros(shape, device=META)
            hidden = self.encode_tokens(self.tokenize(prompts[:size] * copies))
            t = torch.zeros(size * copies, dtype=torch.long, device=META)
            self.predict(latents.repeat(copies, 1, 1, 1), t, hidden)
        return latents[:1].expand(len(prompts), -1, -1, -1)
