# SPDX-License-Identifier: Apache-2.0
"""How an op is declared, and how one of its backends is chosen.

An op is one schema owned by Python. Its plain-torch reference is the default kernel on every
device; a fast kernel stands under a device key. A backend's `available` and `supports` return None,
or the reason why it cannot run: the op then falls back to the reference and logs the reason once. A
backend that is asked for by name and cannot run raises, with the reasons of all of them.

Each schema is registered twice: `torch.ops.zo_kernels.<op>` goes by device, and the overload
`torch.ops.zo_kernels.<op>.reference` is the reference everywhere, for who asks for it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from zo_kernels import _env, _native

NAMESPACE = "zo_kernels"
REFERENCE = "reference"
BACKENDS = ("auto", REFERENCE, "cpp", "triton")
RUNS: Counter[tuple[str, str]] = Counter()  # (op, backend): calls of the kernels written in Python
OPS: dict[str, "Op"] = {}

_CPU = torch.device("cpu")  # comparing takes a tenth of the time of `device.type`
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_log = logging.getLogger(NAMESPACE)
_logged: set[str] = set()
_forced: list[str] = []
_no_cpp = _native.load_ops()  # kept in a variable because `torch.compile` can't trace the loading

Example = tuple[Any, ...]
Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """A fast kernel of an op.

    Attributes:
        name: "cpp" or "triton".
        device: the dispatch key it stands under, in lower case.
        available: None, or why this machine or installation can't run it at all.
        supports: None, or why it can't run these arguments.
        kernel: the Python launcher; None where C++ registers its own.
    """

    name: str
    device: str
    available: Callable[[], str | None]
    supports: Callable[..., str | None]
    kernel: Kernel | None = None

    def reason(self, device: str, args: Sequence[Any]) -> str | None:
        if device != self.device:
            return f"runs on {self.device}, the tensors are on {device}"
        return self.available() or self.supports(*args)


@dataclass(frozen=True, eq=False)
class Op:
    """Call it with every argument of its schema, checked: picks a backend and runs it.

    Gradients flow through an op with a `differentiable`, the autograd function of its formula, and
    through no other.
    """

    name: str
    overload: Any
    reference: Any
    device_of: Callable[..., torch.device | None]
    examples: Callable[[], Iterator[Example]]
    backends: tuple[Backend, ...]
    differentiable: Any = None

    def __call__(self, *args: Any) -> Any:
        run = self.reference if self.choose(args) == REFERENCE else self.overload
        if torch.compiler.is_compiling():
            # A graph that is traced keeps to the formula that torch.library registers. Otherwise
            # that costs as much as a small layer, even where no gradient is asked for.
            if self.differentiable is not None:
                return run(*args)
            with torch.no_grad():
                return run(*args)
        if (
            self.differentiable is not None
            and torch.is_grad_enabled()
            and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
        ):
            return self.differentiable.apply(run, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    def choose(self, args: Sequence[Any]) -> str:
        """Name of the backend that runs these arguments."""
        asked = requested_backend()
        if asked == REFERENCE:
            return REFERENCE
        device = self.device_of(*args)
        kind = "cpu" if device is None or device == _CPU else device.type
        if asked != "auto":
            reasons = {b.name: b.reason(kind, args) for b in self.backends}
            if reasons.get(asked, "") is None:
                return asked
            listed = "".join(f"\n  {name}: {why or 'can run'}" for name, why in reasons.items())
            raise RuntimeError(
                f"{self.name}: backend must be one that can run this call, got {asked!r}; use "
                f"'auto' or one of these\n  {REFERENCE}: can run{listed}"
            )
        for backend in self.backends:
            if backend.device != kind:
                continue
            why = backend.available() or backend.supports(*args)
            if why is None:
                return backend.name
            if not torch.compiler.is_compiling():
                _log_once(f"{self.name}: runs the reference, not {backend.name}, which is {why}")
        return REFERENCE


def define(
    schema: str,
    *,
    reference: Kernel,
    fake: Kernel,
    device_of: Callable[..., torch.device | None],
    examples: Callable[[], Iterator[Example]],
    backends: Sequence[Backend] = (),
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Declare `torch.ops.zo_kernels.<name>` and return the callable that picks its backend.

    Args:
        schema: such as "add_noise_(Tensor(a!)[] params, ...) -> ()".
        reference: the plain-torch kernel, for every device.
        fake: the result's shape and dtype, after the same check as the public wrapper makes.
        device_of: the device that a call runs on; None if it holds no tensor.
        examples: argument tuples on the CPU, for opcheck and the tests of every backend.
        backends: fast kernels, best first.
        setup_context, backward: the autograd formula, as `torch.library.register_autograd` has it.
    """
    name, rest = schema.split("(", 1)

    for overload in (name, f"{name}.{REFERENCE}"):
        _library.define(f"{overload}({rest}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(overload, _counted(name, REFERENCE, reference), "CompositeExplicitAutograd")
        qualified = f"{NAMESPACE}::{overload}"
        torch.library.register_fake(qualified, fake, lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                qualified, backward, setup_context=setup_context, lib=_library
            )
    for backend in backends:
        if backend.kernel is not None:
            key = backend.device.upper()
            _library.impl(name, _guarded(name, backend, backend.kernel, reference), key)

    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    overload, twin = packet.default, getattr(packet, REFERENCE)
    _track_mutation(overload)
    _track_mutation(twin)
    function = None if backward is None else _function(name, setup_context, backward)
    OPS[name] = Op(name, overload, twin, device_of, examples, tuple(backends), function)
    return OPS[name]


def cpp_available() -> str | None:
    """None, or why this installation has no C++ kernels."""
    return _no_cpp


def requested_backend() -> str:
    """The innermost `use_backend`, else ZO_BACKEND, else "auto"."""
    return _forced[-1] if _forced else _known("ZO_BACKEND", _env.backend())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op, in every thread, runs on backend `name` or raises.

    Args:
        name: "auto", "reference", "cpp" or "triton".

    Raises:
        ValueError: another name.
    """
    _forced.append(_known("use_backend", name))
    try:
        yield
    finally:
        _forced.pop()


def _known(where: str, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: backend must be one of {BACKENDS}, got {name!r}; choose one")
    return name


def _counted(name: str, backend: str, kernel: Kernel) -> Kernel:
    @wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        RUNS[name, backend] += 1
        return kernel(*args, **kwargs)

    return run


def _guarded(name: str, backend: Backend, kernel: Kernel, reference: Kernel) -> Kernel:
    """The launcher, or the reference for who calls `torch.ops` with what it does not support."""
    fast, slow = _counted(name, backend.name, kernel), _counted(name, REFERENCE, reference)

    def run(*args: Any) -> Any:
        return (slow if backend.reason(backend.device, args) else fast)(*args)

    return run


def _function(
    name: str, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Any:
    """The autograd function of an op, whose first argument is the overload to run."""

    def forward(run: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if setup_context is not None:
            setup_context(ctx, inputs[1:], output)

    def run_backward(ctx: Any, *grads: Any) -> Any:
        return (None, *backward(ctx, *grads))

    functions: dict[str, Kernel] = {
        "forward": forward,
        "setup_context": set_up,
        "backward": run_backward,
    }
    methods: dict[str, Any] = {key: staticmethod(function) for key, function in functions.items()}
    return type(f"{name}_backward", (torch.autograd.Function,), methods)


def _track_mutation(overload: Any) -> None:
    """Let autograd see in-place ops, so that a graph which saved the old values refuses to run."""
    written = [
        i
        for i, arg in enumerate(overload._schema.arguments)
        if arg.alias_info is not None and arg.alias_info.is_write
    ]
    if not written:
        return

    def run(keyset: Any, *args: Any) -> Any:
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _library.impl(overload, run, "ADInplaceOrView", with_keyset=True)


def _log_once(line: str) -> None:
    if line not in _logged:
        _logged.add(line)
        _log.warning(line)
