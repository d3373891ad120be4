# SPDX-License-Identifier: Apache-2.0
"""`fuse_`: the passes over activations between the integer layers of a diffusers model, merged.

A residual block normalizes, activates and quantizes in the passes of its GroupNorm, adds the time
embedding there, and its residual where the convolution writes. Self-attention quantizes what its
three projections read once. The model keeps its class, its modules and their names: a block changes
to a subclass of its own class, whose forward computes the same within rounding. Where a gradient is
asked for, and for blocks of another make, the class of diffusers runs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from zo_kernels.nn import QuantConv2d, QuantLinear
from zo_kernels.ops import group_norm, group_norm_quantize, qattention, quantize_rows


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
        elif type(module) is Attention and _is_plain(module):
            processor: Any = FusedAttnProcessor()  # diffusers lists the processors it knows
            module.set_processor(processor)
            count += 1
    return count


class FusedResnetBlock2D(ResnetBlock2D):
    """A `ResnetBlock2D` of integer convolutions, without the passes between them."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (
            torch.is_grad_enabled()
            or (self.training and self.dropout.p > 0)
            or not _are_integer(self.conv1, self.conv2)  # wrapped since, as by an adapter
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
        and _are_integer(block.conv1, block.conv2)
    )


def _are_integer(*layers: nn.Module) -> bool:
    return all(isinstance(layer, (QuantConv2d, QuantLinear)) for layer in layers)


def _norm_conv(
    norm: nn.GroupNorm,
    conv: Any,  # QuantConv2d; ResnetBlock2D declares a Conv2d
    x: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """conv(silu(norm(x + shift))) + residual."""
    normalize: Callable[..., Any] = group_norm
    if conv.spec.act_bits == 8 and conv.in_scale is None:
        normalize = group_norm_quantize
    y = normalize(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, shift=shift, activation="silu"
    )
    if isinstance(y, Tensor):
        return conv(y, residual=residual)
    codes, scale = y
    return conv(codes, x_scale=scale, residual=residual, out_dtype=x.dtype)


class FusedAttnProcessor(AttnProcessor2_0):
    """Attention that quantizes what q, k and v share once, and divides by nothing; in fixed point
    where its layers multiply int8."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if torch.is_grad_enabled() or attention_mask is not None or hidden_states.dim() != 3:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
        if encoder_hidden_states is None:
            projected = _project((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        else:
            projected = [
                attn.to_q(hidden_states),
                *_project((attn.to_k, attn.to_v), encoder_hidden_states),
            ]
        project_out, dropout = attn.to_out
        return dropout(project_out(_attend(attn, *projected)))


def _is_plain(attn: Any) -> bool:
    return (
        type(attn.processor) is AttnProcessor2_0
        and attn.spatial_norm is None
        and attn.group_norm is None
        and not attn.norm_cross
        and attn.norm_q is None
        and attn.norm_k is None
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
        and _are_integer(attn.to_q, attn.to_k, attn.to_v)
    )


def _attend(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Heads side by side: [B, M, heads * d], and [B, L, heads * d] twice, to [B, M, heads * d]."""
    if _are_integer(attn.to_q) and attn.to_q.spec.act_bits == 8:
        return qattention(query, key, value, attn.heads)
    heads = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (query, key, value))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def _project(layers: tuple[Any, ...], x: Tensor) -> list[Tensor]:
    if not _are_integer(*layers) or any(
        layer.spec.act_bits != 8 or layer.in_scale is not None for layer in layers
    ):
        return [layer(x) for layer in layers]
    codes, scale = quantize_rows(x)
    return [layer(codes, x_scale=scale, out_dtype=x.dtype) for layer in layers]
