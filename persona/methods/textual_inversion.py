# SPDX-License-Identifier: Apache-2.0
"""ZOODiP: learn one token embedding by forward passes only; or by backpropagation, to compare.

Seo, Jeong, Lee and Chun, CVPR 2025, arXiv 2503.14868.

Algorithm 1. A step draws pictures, noise and timesteps once, evaluates the loss at the token and at
its perturbed copies, several in a batched forward, projects the estimate
(Subspace Gradient), and lets Adam move the fp32 master row. Nothing but the row, its moments and
the buffer is kept: no gradient, no activation, no second copy of a weight.

Gauss-Newton (ours, `persona.gauss_newton`) learns from what the UNet predicts at its probes, not
only from their losses; its state is a matrix over the token's coordinates.

By backpropagation (Gal et al. 2022, arXiv 2208.01618) the gradient is that of one forward, whose
activations are kept for it. Only the new rows learn, so that nothing has to be restored.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from persona.batches import Batch, Batches, copies_at_a_time, mean_errors, predict_copies
from persona.config import TextualInversionConfig
from persona.data import Example
from persona.early_stopping import DRAWS, EarlyStopping
from persona.encoder_jacobian import encoder_moment
from persona.errors import UserError
from persona.export import save_embedding
from persona.families import StableDiffusion
from persona.fixed_batches import FixedBatches
from persona.gauss_newton import GaussNewton
from persona.graphed import graphed
from persona.methods import _method
from persona.methods._method import Method, Step
from persona.optimizer_state import part_of, prefixed
from persona.space import Space
from persona.subspace import SubspaceGradient
from persona.tokens import TokenHook, add_placeholder, expand, initial_id, initial_rows
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
        tokenizer = family.pipe.tokenizer
        initial_id(tokenizer, config.initializer_token)  # or told before pictures are encoded
        ids = add_placeholder(tokenizer, config.placeholder_token, config.num_vectors)
        word = expand(config.placeholder_token, config.placeholder_token, config.num_vectors)
        self.batches = Batches(family, examples, config, word)
        embedding = family.text_encoder.get_input_embeddings()
        self.theta = initial_rows(
            tokenizer, embedding.weight, config.initializer_token, config.num_vectors
        )  # [R, d]
        width = self.theta.shape[1]
        if config.zo_rank > width:
            raise UserError(
                f"zo_rank: must be at most the embedding's {width} dimensions, got "
                f"{config.zo_rank}; 0 takes all"
            )
        self.hook = TokenHook(embedding, ids, self.theta)
        self.predict = graphed(family) if config.cuda_graph else None
        self.space = Space(
            self.theta,
            embedding.weight,
            config.zo_space,
            config.zo_rank,
            config.seed,
            lambda: encoder_moment(family, self.hook, torch.cat(self.batches.ids)),
        )
        self.u = self.space.coordinates()  # [R, k]: what probes and Adam move
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.u), torch.zeros_like(self.u)
        self.mean = torch.zeros_like(self.u)  # of the iterates
        self.steps = 0
        self.rejected = 0  # steps whose loss was not finite
        self.generator = torch.Generator().manual_seed(config.seed)
        self.estimator = Estimator(
            n=config.zo_n, eps=config.zo_eps, estimator=config.zo_estimator, seed=config.seed
        )
        self.newton = self._gauss_newton() if config.optimizer == "gauss-newton" else None
        self.subspace = SubspaceGradient(
            self.u.numel(),
            tau=config.zo_tau,
            nu=config.zo_nu,
            mode=config.zo_subspace if config.optimizer == "zo" else "off",
            seed=config.seed,
        )
        self._copies_per_forward = config.evaluations_per_forward  # 0: see copies_at_a_time
        self.fixed = (
            FixedBatches(self.batches, config.fixed_draws, config.seed)
            if config.fixed_draws
            else None
        )
        self.stopping = EarlyStopping(
            config.early_stopping_patience, config.early_stopping_steps, self.theta
        )
        if self.stopping.patience:
            self._checked = FixedBatches(self.batches, DRAWS, config.seed + 1)

    @property
    def forwards(self) -> int:
        a_step = 1 if self.config.optimizer == "bp" else self.estimator.evaluations
        return self.steps * a_step + self.stopping.checks * self._batches_of_a_check

    @property
    def backwards(self) -> int:
        """Backward passes so far, each of one batch of pictures."""
        return self.steps if self.config.optimizer == "bp" else 0

    def run(self) -> Iterator[Step]:
        """Train up to ``config.max_train_steps``, or until early stopping, which leaves the best
        token; yields after every step, with the state whole."""
        while self.steps < self.config.max_train_steps and not self.stopping.is_over:
            yield self.step()
        if self.stopping.checks:
            self.theta.copy_(self.stopping.token)

    def step(self) -> Step:
        """One update of the token; a loss that is not finite is counted and leaves it as it was."""
        batch = self.draw()
        if self.config.optimizer == "bp":
            return self.take(*self._backpropagate(batch))
        with torch.inference_mode():
            return self.learn(*self._predictions(self.probes(), batch))

    def draw(self) -> Batch:
        """The pictures of this step."""
        return self.fixed.at(self.steps) if self.fixed else self.batches.draw(self.generator)

    def learn(self, predicted: Tensor, target: Tensor) -> Step:
        """End a step by forward passes, from what the UNet predicted at its `probes`.

        Args:
            predicted: [Q, B, C, h, w].
            target: [B, C, h, w], on the same device.
        """
        losses = mean_errors(predicted, target).cpu()  # the one moment when the host waits
        if self.newton is None:
            return self.take(losses[0].item(), self.gradient(losses))
        update = None
        if torch.isfinite(losses).all():
            update = partial(self.newton.update_, self.u, predicted.cpu(), target.cpu(), self.steps)
        return self._end(losses[0].item(), update)

    def take(self, loss: float, gradient: Tensor | None) -> Step:
        """End a step whose gradient is known; None is one that was not finite."""
        return self._end(loss, None if gradient is None else partial(self._adam, gradient))

    def _end(self, loss: float, update: Callable[[], None] | None) -> Step:
        self.steps += 1
        if update is None:
            self.rejected += 1
        else:
            with torch.inference_mode():
                update()
                self._settle()
        if self.stopping.is_due(self.steps):
            self.stopping.check(self._fixed_loss(), self.theta)
        return Step(self.steps, loss, self.forwards, self.rejected)

    def probes(self) -> Tensor:
        """The token and its perturbed copies, all to be evaluated on one batch: [Q, R, d]."""
        if self.newton is not None:
            return self.space.rows(self.newton.probes(self.u, self.steps))
        return self.space.rows(self.estimator.probes(self.u, draw=self._first_draw))

    def gradient(self, losses: Tensor) -> Tensor | None:
        """Of the coordinates, from the losses [Q] of the `probes`; None where one is not finite."""
        if not torch.isfinite(losses).all():
            return None
        free = self.u.numel() - len(self.subspace.basis)
        released = self.config.zo_normalizer == "released-code"
        gradient = self.estimator.gradient(
            losses.double(),
            like=self.u,
            draw=self._first_draw,
            norm_dim=free if released else None,
        )
        return self.subspace.project(gradient)

    @property
    def _first_draw(self) -> int:
        return self.steps * self.estimator.directions

    @torch.enable_grad()
    def _backpropagate(self, batch: Batch) -> tuple[float, Tensor | None]:
        u = self.u.clone().requires_grad_()
        loss = mean_errors(*self._group(self.space.rows(u)[None], batch)).squeeze(0)
        (gradient,) = torch.autograd.grad(loss, u)
        finite = torch.isfinite(gradient).all() and torch.isfinite(loss)
        return loss.item(), gradient if finite else None

    def _gauss_newton(self) -> GaussNewton:
        config, size = self.config, self.u.numel()
        if config.zo_n > size:
            raise UserError(
                f"zo_n: must be at most the {size} coordinates of the token where optimizer is "
                f"gauss-newton, got {config.zo_n}; take fewer, or a higher zo_rank"
            )
        return GaussNewton(
            size, n=config.zo_n, eps=config.zo_eps, damping=config.zo_damping, seed=config.seed
        )

    def _adam(self, gradient: Tensor) -> None:
        config = self.config
        adam_update_(
            self.u,
            gradient,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps - self.rejected,
            lr=config.learning_rate * self._schedule(),
            betas=(config.adam_beta1, config.adam_beta2),
            adam_eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
        )

    def _settle(self) -> None:
        """The token of the coordinates as they are now."""
        config, result = self.config, self.u
        if config.average:
            self.mean.lerp_(self.u, 1 - config.average)
            # It started at zero.
            result = self.mean / (1 - config.average ** (self.steps - self.rejected))
        self.theta.copy_(self.space.rows(result))
        self.subspace.observe(self.u)

    @property
    def _batches_of_a_check(self) -> int:
        return -(-DRAWS // self.config.train_batch_size)

    @torch.inference_mode()
    def _fixed_loss(self) -> float:
        """Of the token, over the same draws at every check."""
        batches = map(self._checked.at, range(self._batches_of_a_check))
        return math.fsum(self._losses(self.theta[None], batch).item() for batch in batches)

    def _schedule(self) -> float:
        """What the learning rate of this step is multiplied with."""
        if self.config.learning_rate_schedule == "constant":
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * (self.steps - 1) / self.config.max_train_steps)

    def _losses(self, copies: Tensor, batch: Batch) -> Tensor:
        """Loss of every copy [Q, R, d] on the same batch: fp32 [Q] on the CPU."""
        return mean_errors(*self._predictions(copies, batch)).cpu()

    def _predictions(self, copies: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the UNet predicts at every copy [Q, R, d], and what it should: `predict_copies`, in
        as many forward passes as memory asks for."""
        while True:
            at_once = self._copies_per_forward or copies_at_a_time(self.family, batch)
            try:
                groups = copies.split(at_once)
                predicted, targets = zip(
                    *(self._group(group, batch) for group in groups), strict=True
                )
                return torch.cat(predicted), targets[0]
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                self._copies_per_forward = (min(at_once, len(copies)) + 1) // 2

    def _group(self, copies: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of one forward pass; where copies take part in autograd, so do the predictions."""
        with self.hook.copies(copies.to(self.family.device, non_blocking=True)):
            return predict_copies(self.family, batch, len(copies), self.predict)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a bit-identical resume needs: a few vectors."""
        return {
            "theta": self.theta,
            "u": self.u,
            "mean": self.mean,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "counts": torch.tensor([self.steps, self.rejected]),
            "generator": self.generator.get_state(),
            **({} if self.newton is None else {"precision": self.newton.precision}),
            **prefixed("subspace", self.subspace.state_dict()),
            **prefixed("stopping", self.stopping.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("theta", "u", "mean"):
            getattr(self, name).copy_(state[name])
        self.exp_avg.copy_(state["exp_avg"])
        self.exp_avg_sq.copy_(state["exp_avg_sq"])
        if self.newton is not None:
            self.newton.precision.copy_(state["precision"])
        self.steps, self.rejected = state["counts"].tolist()
        self.generator.set_state(state["generator"])
        self.subspace.load_state_dict(part_of("subspace", state))
        self.stopping.load_state_dict(part_of("stopping", state))

    def save(self, folder: Path) -> Path:
        """The token as ``learned_embeds.safetensors``, and its twin for other programs."""
        path, _ = save_embedding(folder, self.config.placeholder_token, self.theta, self.metadata())
        return path

    def metadata(self) -> dict[str, str]:
        optimizer = self.config.optimizer
        name = {"zo": "zoodip", "bp": "textual-inversion"}.get(optimizer, optimizer)
        return _method.metadata(self, self.config, name, len(self.batches))
