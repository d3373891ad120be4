# SPDX-License-Identifier: Apache-2.0
"""ZOODiP's training step: against the paper's algorithm written out, and where a run may fail."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from persona.data import load_folder, to_pixels
from persona.families import StableDiffusion
from persona.train import textual_inversion
from zo_kernels.rng import noise

STEPS = 5


def paper(pipe, config, examples, removed):
    """Algorithms 1 and 2, one copy after another in the embedding table; yields the token.

    ``removed()``: the direction without variance that the product's SVD put last: any would do.
    """
    n, tau, mu, lr = config.zo_n, config.zo_tau, config.zo_eps, config.learning_rate
    table = pipe.text_encoder.get_input_embeddings()
    pipe.tokenizer.add_tokens(config.placeholder_token)
    (word,) = pipe.tokenizer.encode(config.initializer_token, add_special_tokens=False)
    theta = table.weight[word].clone()
    table.weight = nn.Parameter(torch.cat([table.weight, theta[None]]))
    posterior = pipe.vae.encode(to_pixels([e.image for e in examples])).latent_dist
    abar, g = pipe.scheduler.alphas_cumprod, torch.Generator().manual_seed(config.seed)
    m, v, tokens, basis = 0, 0, [], torch.zeros(0, len(theta))
    for step in range(STEPS):
        picture = torch.randint(len(examples), (config.train_batch_size,), generator=g)
        torch.randint(1, picture.shape, generator=g)  # mirrored or not: not
        x0 = posterior.mean[picture]
        x0 = x0 + posterior.std[picture] * torch.randn(x0.shape, generator=g)
        x0, eps = x0 * pipe.vae.config.scaling_factor, torch.randn(x0.shape, generator=g)
        t = torch.randint(config.min_timestep, config.max_timestep, picture.shape, generator=g)
        prompts = [examples[i].prompts for i in picture]
        prompts = [p[torch.randint(len(p), (), generator=g)] for p in prompts]
        prompts = [p.replace("{}", config.placeholder_token) for p in prompts]
        ids = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        a = abar[t][:, None, None, None]
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
        z = [noise(len(theta), seed=config.seed, draw=step * n + j, stream=0) for j in range(n)]
        losses = []
        for copy in (theta, *(theta + mu * z_j for z_j in z)):
            table.weight.data[-1] = copy
            predicted = pipe.unet(x_t, t, pipe.text_encoder(ids)[0]).sample
            losses.append((predicted - eps).square().mean().item())
        grad = sum((loss - losses[0]) / mu * z_j for loss, z_j in zip(losses[1:], z, strict=True))
        grad = grad / n
        grad = grad - basis.T @ (basis @ grad)
        m = config.adam_beta1 * m + (1 - config.adam_beta1) * grad
        v = config.adam_beta2 * v + (1 - config.adam_beta2) * grad**2
        m_hat = m / (1 - config.adam_beta1 ** (step + 1))
        v_hat = v / (1 - config.adam_beta2 ** (step + 1))
        theta = theta - lr * m_hat / (v_hat.sqrt() + config.adam_epsilon)
        tokens.append(theta)
        yield theta
        if (step + 1) % tau == 0:
            b = torch.stack(tokens[-tau:]).double()
            _, sigma, vt = torch.linalg.svd((b - b.mean(0)) / b.std(0, correction=0))
            share = sigma.square().cumsum(0) / sigma.square().sum()
            first = int((share > 1 - config.zo_nu).nonzero()[0]) + 1
            basis = torch.cat([vt[first : tau - 1].float(), removed()])


@pytest.mark.parametrize("count", [1, 2])
@torch.inference_mode()
def test_it_is_the_papers_algorithm(options, make_method, fresh_pipeline, pictures_folder, count):
    config = options(
        base_precision="as-loaded", train_batch_size=count, zo_tau=3, zo_nu=0.5, zo_eps=0.1
    )
    method = make_method(config)
    examples = load_folder(pictures_folder, resolution=64)
    reference = paper(fresh_pipeline(), config, examples, lambda: method.subspace.basis[-1:])
    start = method.theta.clone()
    for _ in range(STEPS):
        method.step()
        moved = (method.theta - start).abs().max()
        torch.testing.assert_close(method.theta[0], next(reference), rtol=0, atol=5e-3 * moved)
    assert moved > config.learning_rate
    assert len(method.subspace.basis) == 2 and method.subspace.updates == 1


def run(method, steps=STEPS):
    """Losses of the steps, and the token at the end."""
    return [method.step().loss for _ in range(steps)], method.theta


@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize("together", [1, 2])
def test_copies_in_one_forward_or_one_by_one(options, make_method, estimator, together):
    """Equal up to rounding: a matrix product may add up in another order for another batch."""
    # No subspace: the direction without variance that its SVD puts last is rounding and no more.
    same = {"zo_estimator": estimator, "zo_eps": 0.1, "zo_tau": STEPS + 1}
    losses, token = run(make_method(options(**same)))
    apart, other = run(make_method(options(evaluations_per_forward=together, **same)))
    assert apart == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(other, token, rtol=0, atol=1e-2 * options().learning_rate)


def test_what_does_not_fit_into_memory_is_halved(options, make_method):
    method = make_method(options())
    predict = method.family.predict

    def small(x_t, t, hidden):
        if len(x_t) > 1:
            raise torch.OutOfMemoryError
        return predict(x_t, t, hidden)

    method.family.predict = small
    losses, token = run(method)
    apart, other = run(make_method(options(evaluations_per_forward=1)))
    assert losses == apart and token.equal(other)

    def nothing(*_):
        raise torch.OutOfMemoryError

    method.family.predict = nothing
    with pytest.raises(torch.OutOfMemoryError):
        method.step()


def digests(pipe):
    """A hash of all tensors, for each part of the model."""
    return {
        part: hashlib.sha256(
            b"".join(
                name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
                for name, tensor in sorted(getattr(pipe, part).state_dict().items())
            )
        ).hexdigest()
        for part in ("unet", "text_encoder", "vae")
    }


@pytest.mark.parametrize("precision", ["int8", "as-loaded"])
def test_the_base_model_is_not_touched(options, make_method, precision):
    config = options(base_precision=precision)
    files = sorted(p for p in Path(config.pretrained_model_name_or_path).rglob("*") if p.is_file())
    on_disk = [p.read_bytes() for p in files]
    method = make_method(config)
    before = digests(method.family.pipe)
    start = method.theta.clone()
    run(method)
    assert digests(method.family.pipe) == before and not method.theta.equal(start)
    textual_inversion(config, progress=False)
    assert [p.read_bytes() for p in files] == on_disk


@pytest.mark.parametrize("copy", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(
    options, make_method, copy, value
):
    method = make_method(options())
    run(method, steps=1)
    predict, before = method.family.predict, method.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}

    def broken(x_t, t, hidden):
        out = predict(x_t, t, hidden).clone()
        out[copy, 0, 0, 0] = value
        return out

    method.family.predict = broken
    assert method.step().rejected == 1
    after = method.state_dict()
    assert after.pop("counts").tolist() == [2, 1] and not after.pop("generator").equal(
        before["generator"]
    )
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    method.family.predict = predict
    token = run(method, steps=2)[1]
    assert token.isfinite().all() and not token.equal(before["theta"])


def test_a_run_reports_what_it_rejected(options, monkeypatch, tmp_path):
    calls, predict = 0, StableDiffusion.predict

    def broken(self, x_t, t, hidden):
        nonlocal calls
        calls += 1
        return predict(self, x_t, t, hidden) * (math.nan if calls == 3 else 1)

    monkeypatch.setattr(StableDiffusion, "predict", broken)
    result = textual_inversion(options(), progress=False)
    assert (result.steps, result.rejected) == (6, 1)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "out" / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [line["rejected"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, False, False]
