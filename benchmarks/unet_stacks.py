# SPDX-License-Identifier: Apache-2.0
"""The stacks that `benchmarks.unet` compares: how each is converted once, loaded, and called.

A stack that converts a model keeps the result in a folder (`prepare`) and is later loaded from it,
as its users do; so the peak of loading holds no float model that its users would not hold.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import sd15

Forward = Callable[[], Tensor]  # one forward over fixed inputs; fp32 [B, 4, size, size]
PEERS = ("torch", "quanto", "openvino")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CALIBRATION = 4  # samples for NNCF: its statistics of random latents do not change with more
OURS_SKIP = ("conv_in", "conv_out")  # 4 channels in, 4 out: nothing to gain


@dataclass(frozen=True)
class Job:
    """What a stack is asked to run."""

    stack: str
    model: str
    batch: int
    cache: Path
    seed: int = 0

    def folder(self, *key: object) -> Path:
        """Where this stack keeps a conversion, apart for everything that changes it."""
        text = json.dumps([self.stack, self.model, self.seed, *map(str, key)])
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return (
            self.cache / f"{self.stack.replace('@', '-').replace(':', '-')}-{self.model}-{digest}"
        )


@dataclass(frozen=True)
class Stack:
    """How to run the UNet on one stack.

    Attributes:
        name: such as "quanto-int8-bf16".
        title: what a table calls it.
        peer: one of `PEERS`, or "ours".
        load: job -> (forward, model or None); the model is there where it can be profiled.
        prepare: converts into the folder of the job unless that was done before; None: needs none.
    """

    name: str
    title: str
    peer: str
    load: Callable[[Job], tuple[Forward, Any]]
    prepare: Callable[[Job], None] | None = None


def stacks(peers: Sequence[str], specs: Sequence[str]) -> list[Stack]:
    """All stacks of `peers`, then ours: one for each spec, such as "w8a8" or "w4a8@bf16:unfused"
    (after @ the dtype of everything that is not an integer, default fp32; after : whether blocks
    stay diffusers' own)."""
    made = [stack for stack in _peers() if stack.peer in peers]
    return made + [_ours(spec) for spec in specs]


def _peers() -> list[Stack]:
    made = []
    for dtype in DTYPES:
        made.append(Stack(f"torch-{dtype}", f"torch {dtype}, channels_last", "torch", _load_torch))
    for bits in (8, 4):
        for dtype in DTYPES:
            name, title = f"quanto-int{bits}-{dtype}", f"optimum-quanto qint{bits}, {dtype}"
            made.append(Stack(name, title, "quanto", _load_quanto, _prepare_quanto))
    for kind, title in (("fp32", "OpenVINO fp32"), ("int8", "OpenVINO + NNCF int8")):
        made.append(Stack(f"openvino-{kind}", title, "openvino", _load_openvino, _prepare_openvino))
    return made


def _eager(model: Any, job: Job, dtype: torch.dtype) -> tuple[Forward, Any]:
    latents, timesteps, text = sd15.inputs(job.model, job.batch, job.seed)
    latents = latents.to(dtype, memory_format=torch.channels_last)
    text = text.to(dtype)

    def forward() -> Tensor:
        with torch.no_grad():  # quanto's int4 refuses inference_mode
            return model(latents, timesteps, text, return_dict=False)[0].float()

    return forward, model


def _load_torch(job: Job) -> tuple[Forward, Any]:
    dtype = DTYPES[job.stack.split("-")[1]]
    return _eager(sd15.unet(job.model, dtype, job.seed), job, dtype)


def _quanto_folder(job: Job) -> Path:
    import optimum.quanto

    return job.folder(torch.__version__, optimum.quanto.__version__)


def _prepare_quanto(job: Job) -> None:
    import optimum.quanto as quanto

    folder = _quanto_folder(job)
    if (folder / "map.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _, qtype, dtype = job.stack.split("-")
    model = sd15.unet(job.model, DTYPES[dtype], job.seed)
    quanto.quantize(model, weights=getattr(quanto, f"q{qtype}"))
    quanto.freeze(model)
    torch.save(dict(model.state_dict()), folder / "model.pt")  # it keeps channels_last
    (folder / "map.json").write_text(json.dumps(quanto.quantization_map(model)))  # last: complete


def _load_quanto(job: Job) -> tuple[Forward, Any]:
    import optimum.quanto as quanto

    folder = _quanto_folder(job)
    dtype = DTYPES[job.stack.split("-")[2]]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # what the skeleton is made in, so that the state fits it
    try:
        model = sd15.meta_unet(job.model)
    finally:
        torch.set_default_dtype(default)
    state = torch.load(folder / "model.pt", mmap=True)
    quanto.requantize(model, state, json.loads((folder / "map.json").read_text()))
    return _eager(model.eval().requires_grad_(False), job, dtype)


def _openvino_folder(job: Job, kind: str) -> Path:
    import nncf
    import openvino

    return job.folder(kind, openvino.__version__, nncf.__version__)


def _prepare_openvino(job: Job) -> None:
    kind = job.stack.split("-")[1]
    path = _openvino_folder(job, kind) / "model.xml"
    if path.with_suffix(".done").exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    import openvino

    if kind == "fp32":
        model = _converted(job)
        openvino.save_model(model, path)  # fp16 weights in the file by default
    else:
        import nncf

        def sample(seed: int) -> list[Any]:
            return [x.numpy() for x in sd15.inputs(job.model, 1, 1000 + seed)]

        model = nncf.quantize(
            _converted(job),
            nncf.Dataset([sample(i) for i in range(CALIBRATION)]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=CALIBRATION,
        )
        openvino.save_model(model, path)
    path.with_suffix(".done").touch()


def _converted(job: Job) -> Any:
    """The fp32 UNet as an OpenVINO model with shapes left open but for the size of the picture."""
    import openvino

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = sd15.unet(job.model, seed=job.seed)

        def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
            return self.unet(latents, timesteps, text, return_dict=False)[0]

    example = sd15.inputs(job.model, 1, job.seed)
    with torch.no_grad():
        model = openvino.convert_model(Plain().eval(), example_input=example)
    shapes = {i: openvino.PartialShape([-1, *x.shape[1:]]) for i, x in enumerate(example)}
    model.reshape(shapes)
    return model


def _load_openvino(job: Job) -> tuple[Forward, Any]:
    import openvino

    arrays = [x.numpy() for x in sd15.inputs(job.model, job.batch, job.seed)]
    path = _openvino_folder(job, job.stack.split("-")[1]) / "model.xml"
    core = openvino.Core()
    model = core.read_model(path)
    # Static: what the compiler optimizes best.
    model.reshape({i: openvino.PartialShape(x.shape) for i, x in enumerate(arrays)})
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    return lambda: torch.from_numpy(request.infer(arrays)[0]), None


def _ours(spec: str) -> Stack:
    return Stack(f"zo-{spec}", f"zo_kernels {spec}", "ours", _load_ours, _prepare_ours)


def _our_spec(job: Job) -> tuple[str, torch.dtype, bool]:
    """Format of the layers, dtype of everything else, whether to fuse."""
    rest, _, unfused = job.stack.removeprefix("zo-").partition(":")
    spec, _, dtype = rest.partition("@")
    return spec, DTYPES[dtype or "fp32"], not unfused


def _our_file(job: Job) -> Path:
    """A file of its own for every state of the code that writes it."""
    import zo_kernels

    root = Path(zo_kernels.__file__).parent
    sources = sorted([*root.glob("quant/*.py"), *root.glob("nn/*.py"), root / "packing.py"])
    code = b"".join(source.read_bytes() for source in sources)
    return job.folder(hashlib.sha256(code).hexdigest()) / "model.safetensors"


def _prepare_ours(job: Job) -> None:
    from zo_kernels.quant import QuantConfig, quantize_, save_quantized

    path = _our_file(job)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    spec, dtype, _ = _our_spec(job)
    model = sd15.unet(job.model, dtype, job.seed)
    print(quantize_(model, QuantConfig(spec=spec, skip=OURS_SKIP)))
    save_quantized(model, path)


def _load_ours(job: Job) -> tuple[Forward, Any]:
    from zo_kernels.quant import load_quantized

    _, dtype, fused = _our_spec(job)
    model = load_quantized(sd15.meta_unet(job.model), _our_file(job))
    if fused:
        from persona.fused import fuse_

        print(f"{fuse_(model)} blocks fused")
    return _eager(model, job, dtype)
