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
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from persona.fused_attention import (
    FusedAttnProcessor,
    FusedTransformerBlock,
    can_fuse_attention,
    can_fuse_block,
)
from zo_kernels.nn import QuantConv2d
from zo_kernels.ops import group_norm, group_norm_quantize

_ENLARGED_VALUES = 1 << 23  # of an input between two pixels and the convolution, at a time


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
        elif (
            type(module) is Upsample2D
            and module.interpolate
            and module.norm is None
            and module.name == "conv"
            and _by_rows(module.conv)
        ):
            module.__class__ = FusedUpsample2D
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
        x, how = _norm_for(self.conv2, self.norm2, hidden, shift)
        del hidden  # in a VAE the largest there is
        residual = input_tensor
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(input_tensor)
        return self.conv2(x, residual=residual, **how)


def _can_fuse(block: Any) -> bool:
    return (
        isinstance(block.nonlinearity, nn.SiLU)
        and block.upsample is None
        and block.downsample is None
        and (
            block.time_emb_proj is None  # as in a VAE, which names another norm and has none
            or (block.time_embedding_norm == "default" and not block.skip_time_act)
        )
        and block.output_scale_factor == 1
        and all(type(norm) is nn.GroupNorm for norm in (block.norm1, block.norm2))
        and _are_integer(block, "conv1", "conv2")
    )


class FusedUpsample2D(Upsample2D):
    """An `Upsample2D` of an integer convolution on floating activations, some rows at a time: the
    enlarged input, as large as the output, is never whole."""

    def forward(
        self, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        x = hidden_states
        conv: Any = self.conv
        b, c, h, w = x.shape
        rows = max(1, _ENLARGED_VALUES // (4 * b * c * w))  # of the input
        if torch.is_grad_enabled() or output_size is not None or rows >= h or not _by_rows(conv):
            return super().forward(x, output_size, *args, **kwargs)
        out = torch.empty(
            (b, conv.out_channels, 2 * h, 2 * w),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        for top in range(0, h, rows):
            first, end = max(0, top - 1), min(h, top + rows + 1)  # a row more on either side
            part = conv(F.interpolate(x[:, :, first:end], scale_factor=2.0, mode="nearest"))
            bottom = min(h, top + rows)
            out[:, :, 2 * top : 2 * bottom] = part[:, :, 2 * (top - first) : 2 * (bottom - first)]
        return out


def _by_rows(conv: Any) -> bool:
    """Whether rows of the output depend on few of the input: int8 activations share a scale."""
    return (
        isinstance(conv, QuantConv2d)
        and conv.spec.act_bits != 8
        and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and conv.dilation == (1, 1)
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


def _norm_conv(norm: nn.GroupNorm, conv: Any, x: Tensor, activation: str = "silu") -> Tensor:
    """conv(activation(norm(x)))."""
    y, how = _norm_for(conv, norm, x, activation=activation)
    return conv(y, **how)


def _norm_for(
    conv: Any,  # QuantConv2d; diffusers declares another class
    norm: nn.GroupNorm,
    x: Tensor,
    shift: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, dict[str, Any]]:
    """activation(norm(x + shift)) as the convolution takes it, and what to tell the convolution."""
    normalize: Callable[..., Any] = group_norm
    if conv.spec.act_bits == 8 and conv.in_scale is None:
        normalize = group_norm_quantize
    y = normalize(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, shift=shift, activation=activation
    )
    if isinstance(y, Tensor):
        return y, {}
    codes, scale = y
    return codes, {"x_scale": scale, "out_dtype": x.dtype}
