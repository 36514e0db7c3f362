"""Attention in its plain form while a model is traced: MatMul, Softmax, MatMul.

Fused attention does not trace with a dynamic batch for every architecture (BEiT, MaxViT, Hiera),
compilers fuse the plain form themselves, and torch's MultiheadAttention joins images and tokens in
an order that side branches could not take apart.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention of ``model`` as MatMul, Softmax, MatMul while in the block, images first.

    timm's modules by their own switch, ``nn.MultiheadAttention`` and
    ``F.scaled_dot_product_attention`` by the same mathematics written out.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    packed = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    fast = torch.backends.mha.get_fastpath_enabled()
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    for module in packed:
        module.forward = types.MethodType(_plain_multihead, module)  # type: ignore[method-assign]
    torch.backends.mha.set_fastpath_enabled(False)
    kernel = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _plain_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = kernel
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in packed:
            del module.forward
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` in eval mode: softmax(q kᵀ scale + mask) v."""
    import torch

    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        keep = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if keep else scores + attn_mask
    return torch.softmax(scores, -1) @ value


def _plain_multihead(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward`` in eval mode with the images first in every product."""
    import torch
    from torch.nn import functional

    unusual = self.in_proj_weight is None or self.bias_k is not None or self.add_zero_attn
    if unusual or query.dim() != 3:
        given: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        return type(self).forward(self, query, key, value, **given)
    width, heads = self.embed_dim, self.num_heads
    same = query is key and key is value
    inputs = [t if self.batch_first else t.transpose(0, 1) for t in (query, key, value)]
    if same:
        packed = functional.linear(inputs[0], self.in_proj_weight, self.in_proj_bias)
        batch, tokens, _ = packed.shape
        split = packed.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
    else:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            _heads_second(functional.linear(x, w, b), heads)
            for x, w, b in zip(inputs, self.in_proj_weight.chunk(3), biases, strict=True)
        )
    scores = (q * (width // heads) ** -0.5) @ k.transpose(-2, -1)
    if attn_mask is not None:
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(-1, heads, *attn_mask.shape[1:])
        blocked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask, -torch.inf) if blocked else scores + attn_mask
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        blocked = padding.dtype == torch.bool
        scores = scores.masked_fill(padding, -torch.inf) if blocked else scores + padding
    weights = torch.softmax(scores, -1)
    joined = (weights @ v).transpose(1, 2).flatten(2)
    out = functional.linear(joined, self.out_proj.weight, self.out_proj.bias)
    out = out if self.batch_first else out.transpose(0, 1)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def _heads_second(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, width] as [batch, heads, tokens, width of a head]."""
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(1, 2)
