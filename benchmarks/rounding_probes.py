# SPDX-License-Identifier: Apache-2.0
"""Probes of a model at several precisions: losses of perturbed copies, and the true slopes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from persona.data import load_folder, to_pixels
from persona.demo import RECIPE
from persona.families import StableDiffusion, load_pipeline
from persona.tokens import TokenHook, add_placeholder, initial_rows
from zo_kernels.nn import QuantModule, perturbed, streams_of
from zo_kernels.ops import add_noise_
from zo_kernels.quant import QuantConfig

HEADROOM = 3  # of all models here, so that probes of weights and of codes see the same weights
SAMPLES = 128  # a forward
SEED = 20_240


@dataclass(frozen=True)
class Minibatch:
    """Noised latents [B, C, h, w], what to predict of them, timesteps [B], token ids [B, T]."""

    x_t: Tensor
    target: Tensor
    t: Tensor
    ids: Tensor


class Subject:
    """A model, and the loss of perturbed copies of it on a minibatch.

    Args:
        family: the model.
        theta: fp32 [1, d], the token that is probed.
        ids: its id, as the tokenizer gave it.
        float_unet: the UNet before it was quantized, or one of that shape.
    """

    def __init__(
        self, family: StableDiffusion, theta: Tensor, ids: list[int], float_unet: nn.Module
    ) -> None:
        self.family, self.theta, self.float_unet = family, theta, float_unet
        self.hook = TokenHook(family.pipe.text_encoder.get_input_embeddings(), ids, theta)

    @torch.no_grad()
    def losses(
        self, probe: str, draws: Sequence[int], coeffs: Sequence[float], batch: Minibatch
    ) -> Tensor:
        """fp64 [P]: part p is perturbed by coeffs[p] times the noise of draws[p]."""
        step = max(1, SAMPLES // len(batch.t))
        parts = (slice(i, i + step) for i in range(0, len(draws), step))
        return torch.cat([self._losses(probe, draws[p], coeffs[p], batch) for p in parts])

    def _losses(
        self, probe: str, draws: Sequence[int], coeffs: Sequence[float], batch: Minibatch
    ) -> Tensor:
        count = len(draws)
        if probe == "token":
            rows = torch.stack([self.theta] * count)
            for row, draw, coeff in zip(rows, draws, coeffs, strict=True):
                add_noise_([row], [0], SEED, [draw], [coeff], kind="normal")
            return self.token_losses(rows, batch)
        hidden = self.family.encode_tokens(batch.ids).repeat(count, 1, 1)
        with perturbed(self.family.pipe.unet, seed=SEED, draws=draws, coeffs=coeffs, what=probe):
            return self._errors(hidden, batch, count)

    def token_losses(self, rows: Tensor, batch: Minibatch) -> Tensor:
        """fp64 [P] of the tokens rows [P, 1, d]."""
        with self.hook.copies(rows):
            hidden = self.family.encode_tokens(batch.ids.repeat(len(rows), 1))
        return self._errors(hidden, batch, len(rows))

    def _errors(self, hidden: Tensor, batch: Minibatch, count: int) -> Tensor:
        x_t, t = batch.x_t.repeat(count, 1, 1, 1), batch.t.repeat(count)
        # In fp64, so that only the model's own rounding shows.
        error = self.family.predict(x_t, t, hidden).double() - batch.target.repeat(count, 1, 1, 1)
        return error.square().reshape(count, -1).mean(1)


def slopes(subject: Subject, probe: str, draws: Sequence[int], batch: Minibatch) -> Tensor:
    """fp64 [P]: derivatives of the loss along the directions, by backpropagation.

    `subject` holds integer weights and exact activations; the gradient with respect to its weights
    is taken in a float copy of its UNet.
    """
    if probe == "token":
        rows = subject.theta[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(subject.token_losses(rows, batch).sum(), rows)
        sensitivities, streams, kind = [gradient[0]], [0], "normal"
    else:
        sensitivities, streams = _weight_sensitivities(subject, probe, batch)
        kind = "rademacher"
    out = []
    for draw in draws:
        noise = [torch.zeros_like(s) for s in sensitivities]
        add_noise_(noise, streams, SEED, [draw], [1.0], kind=kind)
        pairs = zip(sensitivities, noise, strict=True)
        out.append(sum(float((s.double() * z).sum()) for s, z in pairs))
    return torch.tensor(out, dtype=torch.float64)


def _weight_sensitivities(
    subject: Subject, probe: str, batch: Minibatch
) -> tuple[list[Tensor], list[int]]:
    """dL / d(noise) of each quantized module, [N] or [N, K], and the modules' streams."""
    unet = subject.family.pipe.unet
    streams = streams_of(unet)
    modules = {name: unet.get_submodule(name) for name in streams}
    twin = float_twin(unet, subject.float_unet)
    weights = [twin.get_submodule(name).get_parameter("weight") for name in streams]
    pipe = subject.family.pipe
    try:
        pipe.unet = twin
        hidden = subject.family.encode_tokens(batch.ids).detach()
        gradients = torch.autograd.grad(subject._errors(hidden, batch, 1).sum(), weights)
    finally:
        pipe.unet = unet
    out = []
    for module, weight, gradient in zip(modules.values(), weights, gradients, strict=True):
        assert isinstance(module, QuantModule)
        rows = gradient.movedim(1, -1).flatten(1)  # in the order in which noise is counted
        if probe == "scale_relative":
            out.append((rows * weight.detach().movedim(1, -1).flatten(1)).sum(1))
        else:
            out.append(rows * module.scale[:, None])
    return out, list(streams.values())


def float_twin(model: nn.Module, shaped: nn.Module) -> nn.Module:
    """A copy of the float model `shaped` that has the weights of the quantized `model`, in fp32;
    they take gradients."""
    twin = copy.deepcopy(shaped)
    for name in streams_of(model):
        module, layer = model.get_submodule(name), twin.get_submodule(name)
        assert isinstance(module, QuantModule)
        layer.weight = nn.Parameter(module.dequantized())
    return twin


def setting(
    model: str, pictures: Path, specs: Sequence[str], batches: int, batch: int
) -> tuple[dict[str, Subject], list[Minibatch]]:
    """The model at each precision ("fp32" is as it is shipped), and minibatches as the demo draws
    them: its pictures, prompts and window of timesteps, and a token at its first value."""
    base = StableDiffusion(load_pipeline(model))
    tokenizer = base.pipe.tokenizer
    embedding = base.pipe.text_encoder.get_input_embeddings()
    theta = initial_rows(tokenizer, embedding.weight, RECIPE["initializer_token"], 1)
    token = RECIPE["placeholder_token"]
    ids = add_placeholder(tokenizer, token, 1)
    examples = load_folder(pictures, resolution=base.resolution)
    mean, std = base.encode_images(to_pixels([e.image for e in examples]))
    prompts = base.tokenize([e.prompts[0].replace("{}", token) for e in examples])
    generator = torch.Generator().manual_seed(SEED)
    drawn = []
    for _ in range(batches):
        i = torch.randint(len(examples), (batch,), generator=generator)
        x0 = mean[i] + std[i] * torch.randn(mean[i].shape, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        window = RECIPE["min_timestep"], RECIPE["max_timestep"]
        t = torch.randint(*window, (batch,), generator=generator)
        x_t, target = base.noised(x0, noise, t), base.target(x0, noise, t)
        drawn.append(Minibatch(x_t, target, t, prompts[i]))
    subjects = {}
    for spec in specs:
        family = StableDiffusion(load_pipeline(model))
        family.pipe.vae = None
        if spec != "fp32":
            family.quantize(QuantConfig(spec, headroom=HEADROOM))
        subjects[spec] = Subject(family, theta, ids, base.pipe.unet)
    return subjects, drawn
