# SPDX-License-Identifier: Apache-2.0
"""The stages of tiny-sd by name; each reads what the earlier ones left in the work folder."""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from . import export, text, unet, vae
from .data import Pictures


def _start(args: argparse.Namespace, part: str = "") -> Path | None:
    return args.start / part if args.start else None


def run_vae(args: argparse.Namespace, pictures: Pictures) -> None:
    model = vae.train(pictures, args.work, minutes=args.vae_minutes, start=_start(args, "vae"))
    mean, std = vae.encode_all(model, pictures)
    # Unit variance over all latents is what a diffusion model expects (Rombach et al. 2022, G).
    scale = 1 / mean.flatten().std().item()
    model.register_to_config(scaling_factor=scale)
    model.save_pretrained(args.work / "vae")
    torch.save((mean * scale, std * scale), args.work / "latents.pt")


def run_text(args: argparse.Namespace, pictures: Pictures) -> None:
    minutes = args.text_minutes
    tokenizer, model = text.train(pictures, args.work, minutes=minutes, start=_start(args))
    tokenizer.save_pretrained(args.work / "tokenizer")
    model.save_pretrained(args.work / "text_encoder")


def run_unet(args: argparse.Namespace, pictures: Pictures) -> None:
    model, encoder = unet.train(
        pictures,
        torch.load(args.work / "latents.pt", weights_only=True),
        CLIPTokenizer.from_pretrained(args.work / "tokenizer"),
        CLIPTextModel.from_pretrained(args.work / "text_encoder", dtype=torch.float32),
        args.work,
        minutes=args.unet_minutes,
        start=_start(args),
        tune_text=args.tune_text,
    )
    model.save_pretrained(args.work / "unet")
    encoder.save_pretrained(args.work / "text_encoder_tuned")


def run_export(args: argparse.Namespace, pictures: Pictures) -> None:
    export.write(
        args.out,
        tokenizer=CLIPTokenizer.from_pretrained(args.work / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(args.work / "text_encoder_tuned"),
        unet=UNet2DConditionModel.from_pretrained(args.work / "unet"),
        vae=AutoencoderKL.from_pretrained(args.work / "vae"),
    )


STAGES = {"vae": run_vae, "text": run_text, "unet": run_unet, "export": run_export}
