# SPDX-License-Identifier: Apache-2.0
"""Batches: the random stream that runs are resumed and repeated by, and its resolutions."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from persona.batches import Batch, Batches, copies_at_a_time, losses
from persona.config import RunConfig
from persona.data import Example, to_pixels
from persona.families import StableDiffusion

# Two draws of the stream, as the first version of textual inversion drew them.
RECORDED = [
    (
        [100.946823, 98.885658, 101.690788, 99.105171, 9.644375, 11.232386, 10.138173, 8.317801],
        [0.317678, 0.132807, 0.137324, 0.240546, 1.395451, 1.347023, 2.438208, 0.202758],
        [716, 827],
        [[1], [10]],
    ),
    (
        [9.542181, 9.275527, 11.279879, 9.005934, 21.814972, 19.397152, 21.614815, 21.930199],
        [-0.422501, -0.083186, -0.983726, -1.249354, -0.188271, 0.282687, 0.130534, 0.330256],
        [795, 756],
        [[11], [20]],
    ),
]


class Plain:
    """A family whose latents are the picture's number, plus 100 for a mirror image, +- 1."""

    def release(self, name):
        assert name == "vae"

    def encode_images(self, pixels):
        number = ((pixels[:, 0, 0, 0] + 1) * 127.5).round()
        mirrored = pixels[0, 0, 0, 0] > pixels[0, 0, 0, -1]
        mean = (number % 100 + 100 * mirrored)[:, None, None, None].expand(-1, 1, 2, 2)
        return mean, torch.ones_like(mean)

    def tokenize(self, prompts):
        return torch.tensor([[int(prompt)] for prompt in prompts])

    def noised(self, x0, noise, t):
        return x0

    def target(self, x0, noise, t):
        return noise


def numbered(number):
    """A picture of 4 pixels a side: ``number`` on the left, more on the right."""
    image = Image.new("RGB", (4, 4), (number,) * 3)
    image.paste((number + 100,) * 3, (2, 0, 4, 4))
    return Example(None, image, (f"{number}", f"{number + 1}"))


@pytest.fixture
def config():
    return RunConfig(train_batch_size=2, random_flip=True, min_timestep=500, max_timestep=900)


def test_the_stream_is_what_it_was(config):
    batches = Batches(Plain(), [numbered(n) for n in (0, 10, 20)], config, "")
    generator = torch.Generator().manual_seed(7)
    for x, noise, t, ids in RECORDED:
        batch = batches.draw(generator)
        assert batch.x_t.flatten().tolist() == pytest.approx(x, abs=2e-5)
        assert batch.target.flatten().tolist() == pytest.approx(noise, abs=2e-6)
        assert (batch.t.tolist(), batch.ids.tolist()) == (t, ids)


def test_given_timesteps_and_resolution(config, fresh_pipeline, picture):
    family = StableDiffusion(fresh_pipeline())
    examples = [Example(None, picture(), ("a {}",))]
    batches = Batches(family, examples, config, "sks dog", resolutions=(32, 64))
    t = torch.tensor([1, 2, 3])
    batch = batches.draw(torch.Generator(), t, resolution=32)
    assert batch.x_t.shape == (3, 4, 4, 4) and batch.t.equal(t)
    assert batches.draw(torch.Generator()).x_t.shape == (2, 4, 8, 8)
    assert batch.ids.equal(family.tokenize(["a sks dog"] * 3))
    mean, std = family.encode_images(to_pixels([examples[0].image.resize((32, 32))]))
    assert batches.latents[32][0][0].equal(mean) and batches.latents[32][1][0].equal(std)


def test_losses_are_a_mean_over_each_member(config, fresh_pipeline, picture):
    family = StableDiffusion(fresh_pipeline())
    batches = Batches(family, [Example(None, picture(), ("a {}",))], config, "dog")
    batch = batches.draw(torch.Generator())
    family.pipe.unet.requires_grad_(True)
    found = losses(family, batch)
    hidden = family.encode_tokens(batch.ids)
    expected = (family.predict(batch.x_t, batch.t, hidden) - batch.target).square()
    assert torch.allclose(found, expected.mean((1, 2, 3)))
    found.sum().backward()
    assert family.pipe.unet.conv_in.weight.grad is not None


@pytest.mark.parametrize(
    ("sample_size", "latents", "copies"),
    [(64, (1, 64), 2), (64, (4, 64), 1), (64, (1, 32), 8), (96, (1, 96), 2), (8, (4, 8), 32)],
)
def test_copies_hold_what_drawing_does(sample_size, latents, copies):
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=sample_size))
    family = SimpleNamespace(pipe=SimpleNamespace(unet=unet))
    members, side = latents
    batch = Batch(torch.empty(members, 4, side, side), *[torch.empty(0)] * 3)
    assert copies_at_a_time(family, batch) == copies
