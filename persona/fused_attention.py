# SPDX-License-Identifier: Apache-2.0
"""Attention and transformer blocks of integer layers, without the passes between them.

Where layers multiply int8: LayerNorm and GEGLU write the codes that the next layer reads, residuals
are added where layers write, and attention runs in fixed point. Everywhere a feed-forward layer
sees a part of the tokens at a time. Where a gradient is asked for, diffusers' classes run.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from zo_kernels.nn import QuantLinear
from zo_kernels.ops import geglu_quantize, layer_norm_quantize, qattention, quantize_rows

# Of a feed-forward layer's widest floats at a time: 8 MB, near the caches, and no new pages.
_GATE_VALUES = 1 << 21


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


def can_fuse_attention(attn: Any) -> bool:
    return (
        type(attn.processor) is AttnProcessor2_0
        and attn.spatial_norm is None
        and attn.group_norm is None
        and not attn.norm_cross
        and attn.norm_q is None
        and attn.norm_k is None
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
        and all(isinstance(layer, QuantLinear) for layer in (attn.to_q, attn.to_k, attn.to_v))
    )


class FusedTransformerBlock(BasicTransformerBlock):
    """A `BasicTransformerBlock` of integer layers: the floats between those of its feed-forward
    stay small, and where they multiply int8 there are few others."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if (
            torch.is_grad_enabled()
            or self.training
            or attention_mask is not None
            or encoder_attention_mask is not None
            or cross_attention_kwargs
        ):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        if _runs_on_codes(self):
            return _transform_codes(self, hidden_states, encoder_hidden_states)
        return _transform(self, hidden_states, encoder_hidden_states)


def can_fuse_block(block: Any) -> bool:
    return (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and not block.only_cross_attention
        and block._chunk_size is None
        and getattr(block, "fuser", None) is None
        and len(block.ff.net) == 3
        and type(block.ff.net[0]) is GEGLU
        and all(can_fuse_attention(attn) for attn in (block.attn1, block.attn2) if attn is not None)
    )


def _runs_on_codes(block: Any) -> bool:
    gate, _, project_out = block.ff.net  # an index into it takes longer than all three
    layers = [gate.proj, project_out]
    for attn in (block.attn1, block.attn2):
        if attn is not None:
            project_out, _ = attn.to_out
            layers += [attn.to_q, attn.to_k, attn.to_v, project_out]
            if not isinstance(attn.processor, AttnProcessor2_0):
                return False
    return all(_takes_codes(layer) for layer in layers)


def _takes_codes(layer: Any) -> bool:
    return isinstance(layer, QuantLinear) and layer.spec.act_bits == 8 and layer.in_scale is None


def _transform(block: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """[B, M, d] to the same; `context` is [B, L, d'], such as of the prompt."""
    x = block.attn1(block.norm1(x)) + x
    if block.attn2 is not None:
        x = block.attn2(block.norm2(x), encoder_hidden_states=context) + x
    return torch.cat([block.ff(block.norm3(part)) + part for part in _parts(x, block.ff)], 1)


def _transform_codes(block: Any, x: Tensor, context: Tensor | None) -> Tensor:
    x = _attention(block.attn1, block.norm1, x)
    if block.attn2 is not None:
        x = _attention(block.attn2, block.norm2, x, context)
    return _feed_forward(block.ff, block.norm3, x)


def _parts(x: Tensor, ff: Any) -> tuple[Tensor, ...]:
    """x [B, M, d] in parts of its tokens, for which the floats within `ff` stay small."""
    gate, _, _ = ff.net
    size = max(1, _GATE_VALUES // max(1, len(x) * gate.proj.out_features))
    return (x,) if x.shape[1] <= size else x.split(size, dim=1)


def _feed_forward(ff: Any, norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """x + ff(norm(x)), a part of the tokens at a time: the floats between its layers stay small."""
    gate, _, project_out = ff.net
    parts = []
    for part in _parts(x, ff):
        codes, scale = _normalize(norm, part)
        parts.append(geglu_quantize(gate.proj(codes, x_scale=scale, out_dtype=x.dtype)))
    codes, scale = (
        parts[0] if len(parts) == 1 else (torch.cat(p, 1) for p in zip(*parts, strict=True))
    )
    return project_out(codes, x_scale=scale, residual=x, out_dtype=x.dtype)


def _normalize(norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    return layer_norm_quantize(x, norm.weight, norm.bias, eps=norm.eps)


def _attention(attn: Any, norm: nn.LayerNorm, x: Tensor, context: Tensor | None = None) -> Tensor:
    """x + attention(norm(x)); keys and values are of `context` [B, L, d] where there is one."""
    codes, scale = _normalize(norm, x)
    query = attn.to_q(codes, x_scale=scale, out_dtype=x.dtype)
    if context is not None:
        codes, scale = quantize_rows(context)
    key, value = (
        layer(codes, x_scale=scale, out_dtype=x.dtype) for layer in (attn.to_k, attn.to_v)
    )
    project_out, _ = attn.to_out
    return project_out(qattention(query, key, value, attn.heads), residual=x)


def _attend(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Heads side by side: [B, M, heads * d], and [B, L, heads * d] twice, to [B, M, heads * d]."""
    if isinstance(attn.to_q, QuantLinear) and attn.to_q.spec.act_bits == 8:
        return qattention(query, key, value, attn.heads)
    heads = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (query, key, value))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def _project(layers: tuple[Any, ...], x: Tensor) -> list[Tensor]:
    if not all(_takes_codes(layer) for layer in layers):
        return [layer(x) for layer in layers]
    codes, scale = quantize_rows(x)
    return [layer(codes, x_scale=scale, out_dtype=x.dtype) for layer in layers]
