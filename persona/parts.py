# SPDX-License-Identifier: Apache-2.0
"""The models of a pipeline, one by one: read from the disk and rounded on the way.

A whole Stable Diffusion 1.5 in floats is several times what a run needs at any time: its parts come
when they are asked for, a float layer at a time, and may leave again.
"""

import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from persona.embedding import halve_embeddings_
from persona.fused import fuse_
from zo_kernels.quant import QuantConfig, quantize_, quantize_checkpoint

MODELS = ("text_encoder", "vae", "unet")
_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
_IGNORED = ("*position_ids",)  # which older versions of transformers stored
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The models in a folder of diffusers' format.

    Attributes:
        folder: with ``model_index.json`` and a folder for each model.
        precision: name of a model -> how its weights are held; others are as loaded, in fp32.
        device: where they go when they are whole.
    """

    folder: Path
    precision: Mapping[str, QuantConfig]
    device: torch.device

    def empty(self, name: str) -> Any:
        """The model without values: its parameters are on the meta device.

        Raises:
            KeyError, AttributeError, ImportError, OSError: the folder names no such model, one of a
                class that is not installed, or lacks its config.
        """
        from accelerate import init_empty_weights

        kind, folder = self._kind(name), self.folder / name
        with init_empty_weights(include_buffers=False):
            if hasattr(kind, "load_config"):  # diffusers
                return kind.from_config(kind.load_config(folder))
            return kind(kind.config_class.from_pretrained(folder))

    def load(self, name: str) -> Any:
        """The model, frozen, as `precision` says, on the device.

        Where its file holds other names than its class has (old files do, which the library's
        reader translates), it is read whole and rounded afterwards.

        Raises:
            What `empty` and the library's reader raise.
        """
        config = self.precision.get(name)
        model = self._whole(name) if config is None else self._rounded(name, config)
        model.requires_grad_(False).eval()
        if config is not None:
            fuse_(model)
            if name == "text_encoder":
                halve_embeddings_(model)
        return model.to(self.device)

    def _rounded(self, name: str, config: QuantConfig) -> Any:
        if (file := self._file(name)) is not None:
            model = self.empty(name)
            try:
                quantize_checkpoint(model, file, config, ignore=_IGNORED)
                return model
            except ValueError as error:
                _log.info("%s is read whole: %s", name, error)
        model = self._whole(name)
        quantize_(model, config)
        return model

    def _whole(self, name: str) -> Any:
        return self._kind(name).from_pretrained(self.folder / name, dtype=torch.float32)

    def _kind(self, name: str) -> Any:
        index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        library, kind = index[name]
        return getattr(importlib.import_module(library), kind)

    def _file(self, name: str) -> Path | None:
        """The file that the library's reader would take, or the index of several."""
        stem = self.folder / name / _FILES[self._kind(name).__module__.partition(".")[0]]
        found = (stem, stem.with_name(f"{stem.name}.index.json"))
        return next((file for file in found if file.is_file()), None)
