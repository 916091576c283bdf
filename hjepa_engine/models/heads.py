"""Heads on frozen features: many of them, with settings of their own, trained in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LinearHeads(nn.Module):
    """G linear classifiers of the same features in one tensor, each with its own learning rate and weight decay.

    Features are standardized first, which is batch norm without affine parameters over the whole training set (MAE,
    arXiv:2111.06377). Weights start at 0. The weights of head g are ``scale_g`` times its parameters, ``scale_g`` being the
    root of its learning rate: a step of SGD (with momentum or without) at learning rate 1 moves them as one at their own
    rate does. Weight decay is the term ``decay_g / 2 * |weights_g|^2`` of the loss, which is SGD's; biases have none.

    Args:
        num_features: F.
        num_classes: C.
        settings: learning rate and weight decay of each head.
        mean: (F,), of the features.
        std: (F,), positive.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor
    decay: Tensor

    def __init__(
        self, num_features: int, num_classes: int, settings: Sequence[tuple[float, float]], mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        rates, decays = (torch.tensor(values)[:, None] for values in zip(*settings, strict=True))
        for name, value in {"mean": mean, "std": std, "scale": rates.sqrt(), "decay": decays}.items():
            self.register_buffer(name, value)
        self.weight = nn.Parameter(torch.zeros(num_features, len(settings), num_classes))
        self.bias = nn.Parameter(torch.zeros(len(settings), num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (G, B, C) of features (B, F)."""
        standardized = (features - self.mean) / self.std
        # One multiplication for all heads: a batch of narrow ones is ten times slower on a CPU.
        logits = (standardized @ self.weight.flatten(1)).view(len(features), *self.bias.shape)
        return (self.scale * (logits + self.bias)).transpose(0, 1)

    def penalty(self) -> Tensor:
        """The sum of all heads' weight decay, ()."""
        return 0.5 * (self.decay * (self.scale * self.weight).square()).sum()


class AttentiveHead(nn.Module):
    """A learned query reads patch tokens by one cross-attention block; a linear classifier reads the query.

    As the attentive probes of CAE (arXiv:2202.03026) and V-JEPA (arXiv:2404.08471), without the MLP of the latter.

    Args:
        dim: D, of the tokens.
        num_classes: C.
        num_heads: of the attention; must divide D.
    """

    def __init__(self, dim: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, C) of tokens (B, N, D)."""
        tokens = self.norm_tokens(tokens)
        query = self.query.expand(len(tokens), -1, -1)
        read, _ = self.attention(query, tokens, tokens, need_weights=False)
        return self.linear(self.norm((query + read)[:, 0]))


class AttentiveHeads(nn.ModuleList):
    """G attentive heads of the same tokens, (B, N, D) to logits (G, B, C); decay is the optimizer's."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (G, B, C) of tokens (B, N, D)."""
        return torch.stack([head(tokens) for head in self])

    def penalty(self) -> Tensor:
        """No term of the loss: 0, ()."""
        return torch.zeros((), device=next(self.parameters()).device)
