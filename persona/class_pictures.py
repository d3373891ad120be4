# SPDX-License-Identifier: Apache-2.0
"""Pictures of the class for prior preservation (DreamBooth, arXiv 2208.12242, section 3.2): made by
the model before it learns, once, and kept beside the run's results."""

import dataclasses
import json
from typing import Any

from persona.config_dreambooth import DreamBoothConfig
from persona.data import Example, load_folder
from persona.families import StableDiffusion
from persona.files import make_folder, write_image, write_json

FOLDER = "class_images"
BATCH = 4  # pictures that are drawn at a time
_DECIDES = ("pretrained_model_name_or_path", "base_precision", "activation_precision", "seed")


def class_pictures(
    family: StableDiffusion, config: DreamBoothConfig, resolution: int
) -> list[Example]:
    """``config.num_class_images`` pictures of ``config.prior_prompt``, of ``resolution`` pixels.

    Those in the folder are taken if the same model, prompt and seed made them.

    Raises:
        UserError: the output folder refuses.
    """
    folder = config.output / FOLDER
    made: dict[str, Any] = {name: getattr(config, name) for name in _DECIDES}
    made |= {"prompt": config.prior_prompt, "count": config.num_class_images}
    note = folder / "made.json"
    if not (note.exists() and json.loads(note.read_text(encoding="utf-8")) == made):
        make_folder(folder)
        note.unlink(missing_ok=True)
        for start in range(0, config.num_class_images, BATCH):
            count = min(BATCH, config.num_class_images - start)
            images = family.sample(
                [config.prior_prompt] * count,
                seed=config.seed + start,
                steps=config.num_inference_steps,
                guidance=config.guidance_scale,
            )
            for i, image in enumerate(images, start):
                write_image(folder / f"{i:05}.png", image)
        write_json(note, made)
    examples = load_folder(folder, resolution=resolution)[: config.num_class_images]
    return [dataclasses.replace(e, prompts=(config.prior_prompt,)) for e in examples]
