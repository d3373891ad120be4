# SPDX-License-Identifier: Apache-2.0
"""The frozen model of a run, as its options say: loaded, checked, quantized."""

from persona.config import RunConfig
from persona.device import chosen
from persona.embedding import halve_embeddings_
from persona.errors import UserError
from persona.families import StableDiffusion, model_folder
from persona.parts import MODELS, Parts
from zo_kernels.quant import QuantConfig

GROUP = 64  # inputs that share a scale of 4-bit weights


def open_base(config: RunConfig) -> StableDiffusion:
    """The model that ``config`` names, checked; its parts come when they are asked for, their
    weights held as it says, on its device.

    Weights become integers on the CPU: they are the same for every device, which never has to hold
    the floats.

    Raises:
        UserError: there is no such device; the model cannot be loaded, or does not allow the
            resolution or the timesteps.
    """
    device = chosen(config.device)
    folder = model_folder(config.pretrained_model_name_or_path)
    family = StableDiffusion.in_parts(Parts(folder, precision(config), device))
    check_model(config, family)
    return family


def load_base(config: RunConfig) -> StableDiffusion:
    """`open_base`, with all parts there."""
    family = open_base(config)
    family.need(*MODELS)
    return family


def check_model(config: RunConfig, family: StableDiffusion) -> None:
    check_resolution("resolution", config.resolution, family)
    limit = len(family.abar)
    if config.max_timestep > limit:
        raise UserError(
            f"max_timestep: must be at most the model's {limit} timesteps, got "
            f"{config.max_timestep}; lower it"
        )


def check_resolution(name: str, value: int, family: StableDiffusion) -> None:
    factor = family.pipe.vae_scale_factor
    if value % factor:
        raise UserError(
            f"{name}: must be a multiple of the model's {factor} pixels, got {value}; 0 takes the "
            f"model's own {family.resolution}"
        )


def precision(config: RunConfig) -> dict[str, QuantConfig]:
    """How the weights of each model are held, as ``base_precision`` and ``activation_precision``
    say; nothing: as loaded.

    int4 is for the UNet alone, as in ZOODiP's 4-bit variant: groups of 64 inputs share a scale;
    layers that these do not fit, the text encoder and the VAE have 8 bits. Beside integers, token
    embeddings have 16 bits; rows that are learned are not among them.
    """
    if config.base_precision == "as-loaded":
        return {}
    activations = "a8" if config.activation_precision == "int8" else ""
    eight = QuantConfig(f"w8{activations}")
    four = QuantConfig(f"w4{activations}-g{GROUP}", fallback=eight.spec)
    unet = eight if config.base_precision == "int8" else four
    return dict.fromkeys(MODELS, eight) | {"unet": unet}


def quantize(config: RunConfig, family: StableDiffusion) -> None:
    """Hold the weights of a model in memory as `precision` says."""
    if held := precision(config):
        family.quantize(held["vae"], unet=held["unet"])
        halve_embeddings_(family.text_encoder)
