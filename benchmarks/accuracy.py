# SPDX-License-Identifier: Apache-2.0
"""What integer weights and activations cost in accuracy, on a base model that can be run anywhere.

    python -m benchmarks.accuracy --data FOLDER

The loss that the model was trained with (noise or velocity prediction) on pictures, noise and
timesteps that are the same for every format; the distance of its predictions from those in fp32;
the signal-to-quantization-noise ratio of every layer by itself; and pictures from the same noise.
UNet and text encoder are quantized; the VAE stays as it is, so that pictures differ by what the
UNet does.

Formats of 4 bits keep the first and the last convolution of the UNet at 8 bits. Groups that do not
divide the input channels of a layer are halved, down to 32, then the layer takes 8 bits: tiny-sd
has 96 channels in half of its layers, so that "g64" means groups of 32 there. The report counts
the layers that each spec got.

What came out on 256 pictures of the training set (`results/accuracy.json`): the loss of w8a8 is
0.23 ± 0.04 % above fp32's, that of w4a8-g64 2.1 ± 0.2 %, of w4a8 per channel 3.3 ± 0.3 %; int8
activations account for 0.2 % everywhere. Range search pays per channel (11.3 -> 10.1 % prediction
error with w4a8), with groups and with 8 bits it changes nothing that can be told from chance. The
layers that lose most are the second linear of the feed-forward under int8 activations, and
`conv_shortcut` at any width.
"""

import argparse
import copy
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.timing import machine
from persona.data import load_folder, to_pixels
from persona.demo import ASSETS, RECIPE
from persona.errors import UserError
from persona.families import StableDiffusion, load_pipeline
from persona.files import make_folder, write_image, write_json
from persona.fit_scorers import read_captioned
from persona.fused import fuse_
from persona.prompts import caption_prompt
from persona.report import grid, table
from zo_kernels.nn import QuantModule, Spec
from zo_kernels.quant import QuantConfig
from zo_kernels.quant.convert import quantize_

SPECS = ("w8a8", "w8", "w4a8-g64", "w4a8-g32", "w4-g64", "w4", "w4a8")
ROUNDINGS = ("absmax", "mse")
ENDS = ("conv_in", "conv_out")
AIMS = {"w8a8": 0.01, "w4a8-g64": 0.04}  # of the loss, relative
PROMPTS = (
    "a 3d emoji of a lamp",
    "a google emoji of a red apple",
    "a twitter emoji of a dog",
    "a 3d emoji of a house",
    "a google emoji of a car",
    "a twitter emoji of a tree",
    "a pixel tile of a stone wall",
    "a clip art of a cat",
)
BATCH = 64
LAYER_BATCH = 8  # samples that layers are compared on
WORST = 10


@dataclass(frozen=True)
class Samples:
    """Clean latents, noise [S, C, h, w], timesteps [S] and token ids [S, T], fixed for all."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    ids: Tensor

    def part(self, places: slice) -> "Samples":
        return Samples(self.x0[places], self.noise[places], self.t[places], self.ids[places])


def pictures_of(folder: Path | None, size: int, count: int) -> list[tuple[Image.Image, str]]:
    """At most `count` pictures of `size` pixels a side with their prompts; None: the demo's."""
    if folder is None:
        examples = load_folder(ASSETS / "demo", resolution=size)
        word = RECIPE["initializer_token"]
        return [(e.image, e.prompts[0].replace("{}", word)) for e in examples][:count]
    images, records = read_captioned(folder)
    usable = [i for i, r in enumerate(records) if not r["variant"]]
    chosen = random.Random(0).sample(usable, min(count, len(usable)))
    return [
        (
            Image.fromarray(images[i]).resize((size, size)),
            caption_prompt(records[i]["caption"], records[i]["style"]),
        )
        for i in chosen
    ]


def samples_of(
    model: StableDiffusion, pictures: Sequence[tuple[Image.Image, str]], count: int
) -> Samples:
    """`count` samples in turns of the pictures; timesteps in equal distances over all."""
    mean, std = model.encode_images(to_pixels([image for image, _ in pictures]))
    ids = model.tokenize([prompt for _, prompt in pictures])
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(count) % len(pictures)
    x0 = mean[places] + std[places] * torch.randn(mean[places].shape, generator=generator)
    steps = len(model.abar)
    t = ((torch.arange(count) + 0.5) * steps / count).long()
    t = t[torch.randperm(count, generator=generator)]
    return Samples(x0, torch.randn(x0.shape, generator=generator), t, ids[places])


@torch.inference_mode()
def predictions(model: StableDiffusion, samples: Samples) -> tuple[Tensor, Tensor]:
    """Predictions fp32 [S, C, h, w], and the loss of each sample, fp64 [S]."""
    out = []
    for start in range(0, len(samples.t), BATCH):
        part = samples.part(slice(start, start + BATCH))
        x_t = model.noised(part.x0, part.noise, part.t)
        out.append(model.predict(x_t, part.t, model.encode_tokens(part.ids)))
    predicted = torch.cat(out)
    error = predicted.double() - model.target(samples.x0, samples.noise, samples.t)
    return predicted, error.square().mean((1, 2, 3))


def compare(
    predicted: Tensor, losses: Tensor, reference: Tensor, reference_losses: Tensor
) -> dict[str, float]:
    """Loss and its relative change with the standard error of it, over the same samples; and
    |prediction - reference| / |reference| in the 2-norm."""
    change = losses - reference_losses
    mean = float(reference_losses.mean())
    spread = float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else 0.0
    away = (predicted - reference).double().norm() / reference.double().norm()
    return {
        "loss": float(losses.mean()),
        "change": float(change.mean()) / mean,
        "change_error": spread / mean,
        "prediction_error": float(away),
    }


def overrides_for(model: nn.Module, spec: str) -> dict[str, str]:
    """Layers of `model` that take another spec than `spec`, and which; see the module."""
    wanted = Spec.parse(spec)
    eight = f"w8{'a8' if wanted.act_bits == 8 else ''}"
    out = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not name:
            continue
        shape = layer.weight.shape
        if wanted.bits == 4 and name in ENDS:
            out[name] = eight
        elif wanted.misfit(shape):
            narrow = [f"{spec.split('-')[0]}-g{g}" for g in (64, 32) if g < (wanted.group or 0)]
            fits = (s for s in narrow if not Spec.parse(s).misfit(shape))
            out[name] = next(fits, eight)
    return out


def quantized(model: StableDiffusion, spec: str, rounding: str) -> tuple[StableDiffusion, Counter]:
    """A quantized copy that shares the VAE with `model`, and how many layers each spec got."""
    vae, model.pipe.vae = model.pipe.vae, None
    try:
        made = StableDiffusion.__new__(StableDiffusion)
        made.__dict__.update(model.__dict__)
        made.pipe = copy.copy(model.pipe)
    finally:
        model.pipe.vae = vae
    made.pipe.vae = vae
    specs: Counter = Counter()
    for part in ("unet", "text_encoder"):
        module = copy.deepcopy(getattr(model.pipe, part))
        config = QuantConfig(spec, rounding, overrides=tuple(overrides_for(module, spec).items()))
        specs.update(quantize_(module, config).quantized.values())
        fuse_(module)  # as it runs
        setattr(made.pipe, part, module)
    return made, specs


@torch.inference_mode()
def layer_noise(
    model: StableDiffusion, other: StableDiffusion, samples: Samples
) -> dict[str, float]:
    """Layer of the UNet -> dB of its output in fp32 over the error of the quantized layer, which
    sees the fp32 model's input: the error of this layer alone."""
    unet, integer = model.pipe.unet, other.pipe.unet
    found: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            error = integer.get_submodule(name)(args[0]).double() - output
            ratio = output.double().square().sum() / error.square().sum().clamp_min(1e-300)
            found[name] = 10 * math.log10(max(float(ratio), 1e-30))

        return hook

    names = [n for n, m in integer.named_modules() if isinstance(m, QuantModule)]
    handles = [unet.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        predictions(model, samples)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure(
    given: argparse.Namespace, say: Callable[[str], None] = print
) -> tuple[dict[str, Any], Image.Image]:
    """All figures, and the pictures."""
    model = StableDiffusion(load_pipeline(given.model))
    pictures = pictures_of(given.data, model.resolution, given.samples)
    samples = samples_of(model, pictures, given.samples)
    reference, reference_losses = predictions(model, samples)
    prompts = PROMPTS[: given.pictures]

    def draw(made: StableDiffusion) -> list[Image.Image]:
        # Guidance and steps as the demo takes them.
        steps, guidance = RECIPE["num_inference_steps"], RECIPE["guidance_scale"]
        return made.sample(list(prompts), seed=0, steps=steps, guidance=guidance)

    rows = [
        {"name": "fp32"} | compare(reference, reference_losses, reference, reference_losses),
    ]
    sheet = [("fp32", draw(model))] if prompts else []
    for spec in given.specs.split(","):
        for rounding in given.roundings.split(","):
            made, specs = quantized(model, spec, rounding)
            row: dict[str, Any] = {"name": f"{spec} {rounding}", "layers": dict(specs)}
            row |= compare(*predictions(made, samples), reference, reference_losses)
            noise = layer_noise(model, made, samples.part(slice(LAYER_BATCH)))
            worst = sorted(noise.items(), key=lambda item: item[1])[:WORST]
            row["sqnr_median_db"] = statistics.median(noise.values())
            row["sqnr_worst_db"] = [
                {"layer": name, "db": db, "spec": str(made.pipe.unet.get_submodule(name).spec)}
                for name, db in worst
            ]
            rows.append(row)
            say(f"{row['name']}: loss {row['loss']:.5f} ({row['change']:+.2%})")
            if prompts and rounding == given.roundings.split(",")[-1]:
                sheet.append((f"{spec}\n{rounding}", draw(made)))
    figures = {
        "machine": machine(),
        "model": Path(given.model).name,
        "prediction_type": model.schedule.config.prediction_type,
        "samples": given.samples,
        "pictures": len(pictures),
        "ends_at_8_bits": list(ENDS),
        "aims": AIMS,
        "rows": rows,
    }
    return figures, grid(sheet, cell=96) if sheet else Image.new("RGB", (1, 1))


def report(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows, worst = [], []
    for row in figures["rows"]:
        layers = ", ".join(f"{n} {spec}" for spec, n in row.get("layers", {}).items())
        median = row.get("sqnr_median_db")
        rows.append(
            (
                row["name"],
                f"{row['loss']:.5f}",
                f"{row['change']:+.2%} ± {row['change_error']:.2%}",
                f"{row['prediction_error']:.2%}",
                "-" if median is None else f"{median:.1f}",
                layers or "-",
            )
        )
        for entry in row.get("sqnr_worst_db", ()) if row["name"].split()[0] in AIMS else ():
            worst.append((row["name"], f"{entry['db']:.1f}", entry["layer"], entry["spec"]))
    header = ("format", "loss", "change", "prediction error", "median layer dB", "layers")
    return "\n\n".join(
        [
            f"{figures['samples']} samples of {figures['pictures']} pictures:",
            table(header, rows),
            "The worst layers, each by itself on fp32 inputs (of all formats in the JSON):",
            table(("format", "dB", "layer", "spec"), worst),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.accuracy``; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy")
    parser.add_argument("--model", default=str(ASSETS / "tiny-sd"), help="diffusers folder")
    parser.add_argument("--data", type=Path, help="train.npz and train.jsonl; default: the demo's")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=len(PROMPTS), help="drawn a format, or 0")
    parser.add_argument("--specs", default=",".join(SPECS))
    parser.add_argument("--roundings", default=",".join(ROUNDINGS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy.json"))
    given = parser.parse_args(arguments)
    try:
        if given.samples < 1 or given.pictures < 0:
            raise UserError(
                "accuracy: samples must be at least 1 and pictures at least 0, got "
                f"{given.samples} and {given.pictures}; the defaults are 256 and {len(PROMPTS)}"
            )
        make_folder(given.out.parent)
        figures, sheet = measure(given)
        write_json(given.out, figures)
        if given.pictures:
            write_image(given.out.with_suffix(".png"), sheet)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{report(figures)}\n\n{given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
