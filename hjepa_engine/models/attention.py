"""Which attention kernel is the fastest, and a block's output for a few of its tokens alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attentions(module: nn.Module) -> list[nn.Module]:
    """The attention layers in a module that can run with a fused kernel or without."""
    return [layer for layer in module.modules() if hasattr(layer, "fused_attn")]


def choose_kernel(layers: Iterable[nn.Module], tokens: Tensor) -> None:
    """Let attention layers run on ``tokens`` (B, N, D) by the faster kernel."""
    fused = is_fused_faster(tokens, tokens.shape[1])
    for layer in layers:
        layer.fused_attn = fused  # type: ignore[assignment]


def is_fused_faster(tokens: Tensor, length: int) -> bool:
    """Whether ``scaled_dot_product_attention`` beats two matrix products and a softmax, for ``length`` keys.

    On a CPU, the backward pass of torch's flash kernel takes 1.3 to 13 times as long in bfloat16, and its forward pass
    longer up to about 256 keys; in float32 up to 32 (docs/performance.md has the table). Two products keep N x N numbers
    for the backward pass, so that the fused kernel is taken for long sequences. On a GPU it is always taken.
    """
    if tokens.device.type != "cpu":
        return True
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tokens.dtype
    if dtype != torch.bfloat16:
        return length > 32
    return length > (1024 if torch.is_grad_enabled() else 256)


def run_queries(block: nn.Module, context: Tensor, queries: Tensor) -> Tensor:
    """What a block makes of queries that attend to the context and to those of their own group.

    Equal to running the block on the sequence context + group for each group, without the context's own outputs, and with
    its keys and values computed once.

    Args:
        block: one of timm's, without layer scale, drop path and norms of queries and keys.
        context: (B, K, P).
        queries: (B, G, Q, P), in G groups.

    Returns:
        (B, G, Q, P).
    """
    made: Any = block
    attention, width, groups = made.attn, queries.shape[-1], queries.shape[1]
    heads = attention.num_heads
    query, key, value = attention.qkv(made.norm1(queries)).unflatten(-1, (3, heads, -1)).unbind(dim=3)
    weight, bias = attention.qkv.weight[width:], attention.qkv.bias[width:]
    seen = F.linear(made.norm1(context), weight, bias).unflatten(-1, (2, heads, -1))[:, None]
    seen_key, seen_value = seen.expand(-1, groups, *seen.shape[2:]).unbind(dim=3)
    key, value = torch.cat([seen_key, key], dim=2), torch.cat([seen_value, value], dim=2)
    query, key, value = (
        part.flatten(0, 1).transpose(1, 2) for part in (query, key, value)
    )  # (B G, heads, length, ...)
    if is_fused_faster(queries, key.shape[2]):
        found = F.scaled_dot_product_attention(query, key, value)
    else:
        found = ((query * attention.scale) @ key.transpose(2, 3)).softmax(dim=-1) @ value
    queries = queries + attention.proj(found.transpose(1, 2).flatten(2)).view_as(queries)
    return queries + made.mlp(made.norm2(queries))
