# SPDX-License-Identifier: Apache-2.0
"""ZOODiP: learn one token embedding by forward passes only.

Seo, Jeong, Lee and Chun, CVPR 2025, arXiv 2503.14868.

Algorithm 1. A step draws pictures, noise and timesteps once, evaluates the loss at the token and at
its perturbed copies, all in one batched forward where memory allows, projects the estimate
(Subspace Gradient), and lets Adam move the fp32 master row. Nothing but the row, its moments and
the buffer is
kept: no gradient, no activation, no second copy of a weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from persona.config import TextualInversionConfig
from persona.data import Example, to_pixels
from persona.families import StableDiffusion
from persona.subspace import SubspaceGradient
from persona.timesteps import Window
from persona.tokens import TokenHook, add_placeholder, expand, initial_rows
from zo_kernels.estimators import Estimator
from zo_kernels.optim import adam_update_


@dataclass(frozen=True)
class Step:
    """What one step reports: finished steps, loss of its first evaluation (one_sided: at the token
    itself), forwards so far, and how many steps were rejected so far."""

    step: int
    loss: float
    forwards: int
    rejected: int


class TextualInversion:
    """The token and everything that its training keeps.

    Args:
        family: the frozen (and, as a rule, quantized) model; the tokenizer gets the new word, the
            embedding table is not touched.
        config: options.
        examples: the subject's pictures.

    Raises:
        UserError: placeholder or initializer token do not fit the tokenizer.
    """

    def __init__(
        self, family: StableDiffusion, config: TextualInversionConfig, examples: list[Example]
    ) -> None:
        self.family, self.config = family, config
        embedding = family.pipe.text_encoder.get_input_embeddings()
        tokenizer = family.pipe.tokenizer
        self.theta = initial_rows(
            tokenizer, embedding.weight, config.initializer_token, config.num_vectors
        )
        ids = add_placeholder(tokenizer, config.placeholder_token, config.num_vectors)
        self.hook = TokenHook(embedding, ids, self.theta)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.steps = 0
        self.rejected = 0  # steps whose loss was not finite
        self.generator = torch.Generator().manual_seed(config.seed)
        self.estimator = Estimator(
            n=config.zo_n, eps=config.zo_eps, estimator=config.zo_estimator, seed=config.seed
        )
        self.subspace = SubspaceGradient(
            self.theta.numel(),
            tau=config.zo_tau,
            nu=config.zo_nu,
            mode=config.zo_subspace,
            seed=config.seed,
        )
        self.window = Window(config.min_timestep, config.max_timestep)
        self._copies_per_forward = config.evaluations_per_forward or self.estimator.evaluations
        self._cache(examples)

    @torch.inference_mode()
    def _cache(self, examples: list[Example]) -> None:
        """Latents of every picture (and its mirror image), token ids of every prompt."""
        pixels = to_pixels([e.image for e in examples])
        views = [pixels, pixels.flip(-1)] if self.config.random_flip else [pixels]
        encoded = [self.family.encode_images(view) for view in views]
        # [views, pictures, C, h, w]
        self.means = torch.stack([mean for mean, _ in encoded]).clone()
        self.stds = torch.stack([std for _, std in encoded]).clone()
        word = expand(
            self.config.placeholder_token, self.config.placeholder_token, self.config.num_vectors
        )
        self.ids = [
            self.family.tokenize([p.replace("{}", word) for p in e.prompts]) for e in examples
        ]

    def run(self) -> Iterator[Step]:
        """Train up to ``config.max_train_steps``; yields after every step, with the state whole."""
        while self.steps < self.config.max_train_steps:
            yield self.step()

    @torch.inference_mode()
    def step(self) -> Step:
        """One update of the token; a loss that is not finite is counted and leaves it as it was."""
        draw = self.steps * self.config.zo_n
        batch = self._draw_batch()
        losses = self._losses(self.estimator.probes(self.theta, draw=draw), *batch)
        self.steps += 1
        if not torch.isfinite(losses).all():
            self.rejected += 1
        else:
            self._update(losses, draw)
        forwards = self.steps * self.estimator.evaluations
        return Step(self.steps, losses[0].item(), forwards, self.rejected)

    def _update(self, losses: Tensor, draw: int) -> None:
        config = self.config
        free = self.theta.numel() - len(self.subspace.basis)
        gradient = self.estimator.gradient(
            losses.double(),
            like=self.theta,
            draw=draw,
            norm_dim=free if config.zo_normalizer == "released-code" else None,
        )
        adam_update_(
            self.theta,
            self.subspace.project(gradient),
            self.exp_avg,
            self.exp_avg_sq,
            self.steps - self.rejected,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            adam_eps=config.adam_epsilon,
        )
        self.subspace.observe(self.theta)

    def _draw_batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noised latents [B, C, h, w], their targets, timesteps [B], token ids [B, T]."""
        g, count = self.generator, self.config.train_batch_size
        picture = torch.randint(len(self.ids), (count,), generator=g)
        view = torch.randint(len(self.means), (count,), generator=g)
        mean, std = self.means[view, picture], self.stds[view, picture]
        x0 = mean + std * torch.randn(mean.shape, generator=g)
        noise = torch.randn(mean.shape, generator=g)
        t = self.window.sample(count, g)
        ids = [
            prompts[int(torch.randint(len(prompts), (), generator=g))]
            for prompts in (self.ids[i] for i in picture.tolist())
        ]
        x_t, target = self.family.noised(x0, noise, t), self.family.target(x0, noise, t)
        return x_t, target, t, torch.stack(ids)

    def _losses(
        self, copies: Tensor, x_t: Tensor, target: Tensor, t: Tensor, ids: Tensor
    ) -> Tensor:
        """Loss of every copy [Q, R, d] on the same batch: fp32 [Q]."""
        while True:
            try:
                groups = copies.split(self._copies_per_forward)
                return torch.cat([self._group_losses(g, x_t, target, t, ids) for g in groups])
            except torch.OutOfMemoryError:
                if self._copies_per_forward == 1:
                    raise
                self._copies_per_forward = (self._copies_per_forward + 1) // 2

    def _group_losses(
        self, copies: Tensor, x_t: Tensor, target: Tensor, t: Tensor, ids: Tensor
    ) -> Tensor:
        device, count = self.family.device, len(copies)
        with self.hook.copies(copies.to(device)):
            hidden = self.family.encode_tokens(ids.repeat(count, 1))
        predicted = self.family.predict(
            x_t.to(device).repeat(count, 1, 1, 1), t.to(device).repeat(count), hidden
        )
        error = (predicted - target.to(device).repeat(count, 1, 1, 1)).square()
        return error.reshape(count, -1).mean(1).cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """All that a bit-identical resume needs: a few vectors."""
        return {
            "theta": self.theta,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "counts": torch.tensor([self.steps, self.rejected]),
            "generator": self.generator.get_state(),
            **{f"subspace.{k}": v for k, v in self.subspace.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.theta.copy_(state["theta"])
        self.exp_avg.copy_(state["exp_avg"])
        self.exp_avg_sq.copy_(state["exp_avg_sq"])
        self.steps, self.rejected = state["counts"].tolist()
        self.generator.set_state(state["generator"])
        prefix = "subspace."
        self.subspace.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
