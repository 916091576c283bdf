"""Convolutions that turn pixels into patch tokens, in place of one linear map of each patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hjepa_engine.utils.imports import block_import

with block_import("wandb"):  # timm imports it if it is installed
    from timm.layers.norm import LayerNorm2d


def conv_stem(in_chans: int, embed_dim: int, patch_size: int) -> nn.Sequential:
    """Overlapping 3 x 3 convolutions of stride 2, each halving the image, then a 1 x 1 convolution to ``embed_dim``.

    With few images or few epochs, they learn what a linear map of single patches takes long to (arXiv:2106.14881). Each
    convolution has twice the channels of the one before, up to half of ``embed_dim``.

    Args:
        in_chans: C of the images.
        embed_dim: D of the tokens.
        patch_size: side of a patch in pixels, a power of two, at least 2.

    Raises:
        ValueError: the patch size is none.
    """
    halvings = patch_size.bit_length() - 1
    if patch_size < 2 or patch_size != 2**halvings:
        raise ValueError(f"patch_size of a conv stem must be a power of two, at least 2, got {patch_size}")
    widths = [max(8, embed_dim // 2 ** (halvings - number)) for number in range(halvings)]
    layers: list[nn.Module] = []
    for before, after in zip((in_chans, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), LayerNorm2d(after), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))


def hide_pixels(images: Tensor, patch_idx: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) with 0, the mean of normalized pixels, wherever a patch is not in ``patch_idx`` (B, K).

    Convolutions reach across the edges of a patch: without this, visible tokens would tell of hidden pixels.
    """
    rows, columns = grid
    visible = torch.zeros(len(images), rows * columns, dtype=images.dtype, device=images.device)
    visible = visible.scatter(1, patch_idx, 1.0).view(-1, 1, rows, columns)
    height, width = images.shape[2] // rows, images.shape[3] // columns
    return images * visible.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
