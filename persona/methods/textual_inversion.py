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
from pathlib import Path

import torch
from torch import Tensor

from persona.batches import Batch, Batches
from persona.config import TextualInversionConfig
from persona.data import Example
from persona.export import save_embedding
from persona.families import StableDiffusion
from persona.methods import _method
from persona.methods._method import Method, Step
from persona.subspace import SubspaceGradient
from persona.tokens import TokenHook, add_placeholder, expand, initial_rows
from zo_kernels.estimators import Estimator
from zo_kernels.optim import adam_update_


class TextualInversion(Method):
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
        self._copies_per_forward = config.evaluations_per_forward or self.estimator.evaluations
        word = expand(config.placeholder_token, config.placeholder_token, config.num_vectors)
        self.batches = Batches(family, examples, config, word)

    @property
    def forwards(self) -> int:
        return self.steps * self.estimator.evaluations

    def run(self) -> Iterator[Step]:
        """Train up to ``config.max_train_steps``; yields after every step, with the state whole."""
        while self.steps < self.config.max_train_steps:
            yield self.step()

    @torch.inference_mode()
    def step(self) -> Step:
        """One update of the token; a loss that is not finite is counted and leaves it as it was."""
        draw = self.steps * self.config.zo_n
        batch = self.batches.draw(self.generator)
        losses = self._losses(self.estimator.probes(self.theta, draw=draw), batch)
        self.steps += 1
        if not torch.isfinite(losses).all():
            self.rejected += 1
        else:
            self._update(losses, draw)
        return Step(self.steps, losses[0].item(), self.forwards, self.rejected)

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

    def _losses(self, copies: Tensor, batch: Batch) -> Tensor:
        """Loss of every copy [Q, R, d] on the same batch: fp32 [Q]."""
        while True:
            try:
                groups = copies.split(self._copies_per_forward)
                return torch.cat([self._group_losses(group, batch) for group in groups])
            except torch.OutOfMemoryError:
                if self._copies_per_forward == 1:
                    raise
                self._copies_per_forward = (self._copies_per_forward + 1) // 2

    def _group_losses(self, copies: Tensor, batch: Batch) -> Tensor:
        device, count = self.family.device, len(copies)
        with self.hook.copies(copies.to(device)):
            hidden = self.family.encode_tokens(batch.ids.repeat(count, 1))
        predicted = self.family.predict(
            batch.x_t.to(device).repeat(count, 1, 1, 1), batch.t.to(device).repeat(count), hidden
        )
        error = (predicted - batch.target.to(device).repeat(count, 1, 1, 1)).square()
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

    def save(self, folder: Path) -> Path:
        """The token as ``learned_embeds.safetensors``, and its twin for other programs."""
        path, _ = save_embedding(folder, self.config.placeholder_token, self.theta, self.metadata())
        return path

    def metadata(self) -> dict[str, str]:
        return _method.metadata(self, self.config, "zoodip", len(self.batches))
