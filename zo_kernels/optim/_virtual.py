# SPDX-License-Identifier: Apache-2.0
"""Perturbed weights that exist only inside the function that reads them.

While a `Virtual` probe is active, every torch function that gets a trained parameter (F.linear,
F.conv2d, F.embedding, a norm, w.t(), x * w, ...) gets a perturbed copy instead, made for the call
and freed after it. The model is not modified and the parameter is never written; memory is one
tensor, the largest. It reads the same in eager code, under no_grad and inference_mode, in modules
and in plain functions. What torch functions do not see stays unperturbed: views that were made
before the evaluation, and compiled or scripted graphs; a step that reads no trained parameter at
all is therefore an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zo_kernels.optim._calls import Action, Base, adding

if TYPE_CHECKING:
    from zo_kernels.optim._probe import Span, Term

# Methods that tell about a tensor without reading it; getters such as `.shape` are told apart by
# what they return.
_METADATA = {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "__len__"}
_METADATA |= {"storage_offset", "is_contiguous", "is_floating_point", "is_complex", "get_device"}
_METADATA |= {"data_ptr", "untyped_storage", "is_inference", "is_neg", "is_conj", "__hash__"}
_METADATA |= {"requires_grad_", "register_hook", "is_same_size", "sym_size", "__deepcopy__"}


class Virtual(TorchFunctionMode):
    """The probe of `_probe.Probe` that never writes; itself the context of an evaluation.

    reads: number of perturbed copies that it made.
    """

    base: Base | None = None

    def __init__(self, spans: Sequence[Span], seed: int, kind: str) -> None:
        super().__init__()
        self.seed, self.kind = seed, kind
        self.where = {
            id(p): (stream, span.group)
            for span in spans
            for p, stream in zip(span.params, span.streams, strict=True)
        }
        self.draw, self.sign, self.reads = 0, 0.0, 0

    def write(self, draw: int, sign: float) -> None:
        self.draw, self.sign = draw, sign

    def reading(self) -> AbstractContextManager[Any]:
        return self if self.sign else nullcontext()

    def begin(self, held: Sequence[Term | None] = ()) -> None:
        pass

    def release(self, number: int) -> tuple[list[Action], list[Term]]:
        return [], []

    def restore(self) -> None:
        self.sign = 0.0

    def check(self, owner: str) -> None:
        """Raises RuntimeError if no evaluation read a perturbed parameter."""
        if not self.reads:
            raise RuntimeError(
                f"{owner}: closure must read a trained parameter by torch functions, got no read; "
                "use probe='snapshot' or 'in_place' for a compiled or scripted model"
            )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _METADATA or not self._reaches([*args, *kwargs.values()]):
            return func(*args, **kwargs)
        if name == "__get__":
            value = func(*args, **kwargs)
            if not isinstance(value, Tensor):
                return value
        writes = (name.endswith("_") and not name.endswith("__")) or name in (
            "__set__",
            "__setitem__",
        )
        if (writes and args and self._reaches(args[:1])) or self._reaches([kwargs.get("out")]):
            raise RuntimeError(
                f"virtual: the evaluation must not write a trained parameter, got {name}; "
                "use probe='snapshot' for a model that changes its weights as it runs"
            )
        # Inside this method the mode is off: what `func` calls reads the copies as they are.
        made: dict[int, Tensor] = {}
        args = [self._perturbed(a, made) for a in args]
        kwargs = {key: self._perturbed(a, made) for key, a in kwargs.items()}
        return func(*args, **kwargs)

    def _reaches(self, values: Sequence[Any]) -> bool:
        return any(
            self._reaches(v) if isinstance(v, (list, tuple)) else id(v) in self.where
            for v in values
        )

    def _perturbed(self, value: Any, made: dict[int, Tensor]) -> Any:
        if isinstance(value, (list, tuple)) and self._reaches(value):
            copies = [self._perturbed(v, made) for v in value]
            return copies if isinstance(value, list) else tuple(copies)
        found = self.where.get(id(value))
        if found is None:
            return value
        if id(value) not in made:
            stream, group = found
            # torch chooses some of its paths by the flags of a tensor, and they differ by an ulp:
            # the copy is neither an inference tensor nor one that needs no gradient.
            with torch.inference_mode(False), torch.no_grad():
                copy = value.detach().clone()
                for call in adding([copy], [stream], [(self.draw, self.sign * group["eps"])]):
                    if self.base is None:
                        call.run(self.seed, self.kind)
                    else:
                        call.run_at(self.base, self.seed, self.kind)
                made[id(value)] = copy.requires_grad_(value.requires_grad)
            self.reads += 1
        return made[id(value)]
