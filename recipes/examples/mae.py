"""A masked autoencoder (MAE, arXiv:2111.06377): an encoder sees a quarter of the patches, a decoder draws the others.

    python recipes/pretrain.py --config recipes/configs/mae.yaml

The YAML file names ``mae_step`` and ``build_modules``; that is all the wiring. Departures from the paper: encoder and
decoder are as small as the images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hjepa_engine import Config
from hjepa_engine.models import ContextEncoder, encoder_arguments
from hjepa_engine.models.positions import sincos_2d
from hjepa_engine.types import Batch, Outputs, unwrap


class Decoder(nn.Module):
    """From tokens (B, K, D) of the patches ``patch_idx`` (B, K) to the pixels of all patches (B, N, P)."""

    def __init__(
        self, encoder: ContextEncoder, num_pixels: int, width: int, depth: int = 1, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Buffer(sincos_2d(encoder.grid, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, num_pixels)

    def forward(self, tokens: Tensor, patch_idx: Tensor) -> Tensor:
        """Fill the hidden patches with mask tokens, then decode all."""
        embedded = self.embed(tokens)
        filled = self.mask_token.to(embedded.dtype).repeat(len(tokens), len(self.positions), 1)
        filled = filled.scatter(1, patch_idx[..., None].expand_as(embedded), embedded)
        return self.head(self.blocks(filled + self.positions))


def build_modules(config: Config, width: int = 48) -> nn.ModuleDict:
    """``encoder`` as ``model`` in the configuration describes it, and a ``decoder`` that is thrown away afterwards."""
    encoder = ContextEncoder(**encoder_arguments(config))
    num_pixels = config.data.channels * math.prod(encoder.vit.patch_embed.patch_size)
    return nn.ModuleDict({"encoder": encoder, "decoder": Decoder(encoder, num_pixels, width)})


def mae_step(modules: nn.ModuleDict, batch: Batch, mask_ratio: float = 0.75) -> Outputs:
    """Mean squared error of hidden patches, each normalized; random numbers are those that the run seeds at every step."""
    images, num_patches = batch["images"], len(unwrap(modules["decoder"]).positions)
    order = torch.rand(len(images), num_patches, device=images.device).argsort(dim=1)
    visible = order[:, : round(num_patches * (1 - mask_ratio))]
    tokens = modules["encoder"](images, visible)
    decoded = modules["decoder"](tokens, visible).float()
    side = round((images.shape[-2:].numel() / num_patches) ** 0.5)
    pixels = F.layer_norm(patches := F.unfold(images, side, stride=side).mT, patches.shape[-1:])
    hidden = torch.ones_like(order, dtype=torch.float).scatter(1, visible, 0.0)
    loss = ((decoded - pixels).square().mean(dim=-1) * hidden).sum() / hidden.sum()
    return {"loss": loss, "context_tokens": tokens, "context_idx": visible}
