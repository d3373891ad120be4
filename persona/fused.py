# SPDX-License-Identifier: Apache-2.0
"""`fuse_`: the passes over activations between the integer layers of a diffusers model, merged.

A residual block normalizes, activates and quantizes in the passes of its GroupNorm, adds the time
embedding there, and its residual where the convolution writes; so does what leads into and out of
transformer blocks, and for these see `persona.fused_attention`. The model keeps its class, its
modules and their names: a block changes to a subclass of its own class, whose forward computes the
same within rounding. Where a gradient is asked for, and for blocks of another make, the class of
diffusers runs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from persona.fused_attention import (
    FusedAttnProcessor,
    FusedTransformerBlock,
    can_fuse_attention,
    can_fuse_block,
)
from zo_kernels.nn import QuantConv2d
from zo_kernels.ops import group_norm, group_norm_quantize


def fuse_(model: nn.Module) -> int:
    """Merge what can be merged in `model`, in place; a second call finds nothing.

    Call it after `quantize_`: blocks whose convolutions are floating stay as they are.

    Args:
        model: such as `pipe.unet` or `pipe.vae`.

    Returns:
        How many blocks and attentions changed.
    """
    count = 0
    for module in model.modules():
        if type(module) is ResnetBlock2D and _can_fuse(module):
            module.__class__ = FusedResnetBlock2D
            count += 1
        elif type(module) is Attention and can_fuse_attention(module):
            processor: Any = FusedAttnProcessor()  # diffusers lists the processors it knows
            module.set_processor(processor)
            count += 1
        elif type(module) is BasicTransformerBlock and can_fuse_block(module):
            module.__class__ = FusedTransformerBlock
            count += 1
        elif type(module) is Transformer2DModel and _are_integer(module, "proj_in", "proj_out"):
            module.__class__ = FusedTransformer2DModel
            count += 1
    return count


class FusedResnetBlock2D(ResnetBlock2D):
    """A `ResnetBlock2D` of integer convolutions, without the passes between them."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (
            torch.is_grad_enabled()
            or (self.training and self.dropout.p > 0)
            or not _are_integer(self, "conv1", "conv2")  # wrapped since, as by an adapter
        ):
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden = _norm_conv(self.norm1, self.conv1, input_tensor)
        shift = None
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(F.silu(temb))  # [B, C]
        residual = input_tensor
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(input_tensor)
        return _norm_conv(self.norm2, self.conv2, hidden, shift, residual)


def _can_fuse(block: Any) -> bool:
    return (
        isinstance(block.nonlinearity, nn.SiLU)
        and block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and (block.time_emb_proj is None or not block.skip_time_act)
        and block.output_scale_factor == 1
        and all(type(norm) is nn.GroupNorm for norm in (block.norm1, block.norm2))
        and _are_integer(block, "conv1", "conv2")
    )


class FusedTransformer2DModel(Transformer2DModel):
    """A `Transformer2DModel` between integer 1x1 convolutions: pixels stay where they lie."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        if torch.is_grad_enabled() or not _are_integer(self, "proj_in", "proj_out"):
            return super()._operate_on_continuous_inputs(hidden_states)
        y = _norm_conv(self.norm, self.proj_in, hidden_states, activation="none")
        return y.permute(0, 2, 3, 1).flatten(1, 2), y.shape[1]  # [B, H * W, C]

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        if torch.is_grad_enabled() or not _are_integer(self, "proj_in", "proj_out"):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        pixels = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        project_out: Any = self.proj_out
        return project_out(pixels, residual=residual)


def _are_integer(block: Any, *names: str) -> bool:
    return all(isinstance(getattr(block, name, None), QuantConv2d) for name in names)


def _norm_conv(
    norm: nn.GroupNorm,
    conv: Any,  # QuantConv2d; diffusers declares another class
    x: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """conv(activation(norm(x + shift))) + residual."""
    normalize: Callable[..., Any] = group_norm
    if conv.spec.act_bits == 8 and conv.in_scale is None:
        normalize = group_norm_quantize
    y = normalize(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, shift=shift, activation=activation
    )
    if isinstance(y, Tensor):
        return conv(y, residual=residual)
    codes, scale = y
    return conv(codes, x_scale=scale, residual=residual, out_dtype=x.dtype)
