"""Context and target encoder: a timm vision transformer that can run on a subset of the patches."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hjepa_engine.levels import take_tokens
from hjepa_engine.models.attention import attentions, choose_kernel
from hjepa_engine.models.init import Init, init_layer, init_weights, trunc_normal
from hjepa_engine.models.positions import sincos_2d
from hjepa_engine.models.stem import conv_stem, hide_pixels
from hjepa_engine.utils.imports import block_import

with block_import("wandb"):  # timm imports it if it is installed
    import timm
    from timm.models.vision_transformer import VisionTransformer


class ContextEncoder(nn.Module):
    """A vision transformer that runs on the visible patches only; masked patches are dropped, not zeroed.

    Args:
        name: any of timm's vision transformers (``timm.list_models("vit_*")``).
        img_size: H and W of the images, in pixels; one number where they are equal.
        in_chans: C of the images.
        pos_embed: ``sincos``: fixed 2-D sine-cosine embeddings (I-JEPA); ``learned``: trained.
        stem: what makes tokens of pixels. ``patch``: a linear map of each patch; ``conv``:
            :func:`~hjepa_engine.models.stem.conv_stem`, before which masked patches are hidden.
        init: initial weights of the blocks' linear layers, see :func:`~hjepa_engine.models.init.init_layer`.
        patch_init: weights of the patch embedding at the start. ``uniform``: torch's own, whose scale is that of the patch's
            pixels; ``trunc_normal``: of standard deviation 0.02, bias 0 (I-JEPA).
        activation_checkpointing: recompute each block's activations in the backward pass to save memory.
        norm_eps: what the layer norms add to the variance; timm's own by default, 1e-6.
        **overrides: arguments of timm's ``VisionTransformer`` that replace those of the named model (``patch_size``,
            ``embed_dim``, ``depth``, ``num_heads``, ``drop_path_rate``, ``init_values`` (layer scale), ...).

    Raises:
        ValueError: the name is unknown or not a plain vision transformer, or the sizes are incompatible.
    """

    def __init__(
        self,
        name: str,
        img_size: int | Sequence[int],
        *,
        in_chans: int = 3,
        pos_embed: Literal["sincos", "learned"] = "sincos",
        stem: Literal["patch", "conv"] = "patch",
        init: Init = "trunc_normal",
        patch_init: Literal["uniform", "trunc_normal"] = "uniform",
        activation_checkpointing: bool = False,
        norm_eps: float | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        height, width = size = _sides(img_size)
        #: Arguments that build the same encoder, for the export.
        self.arguments = {
            "name": name,
            "img_size": height if height == width else size,
            "in_chans": in_chans,
            "pos_embed": pos_embed,
            "activation_checkpointing": activation_checkpointing,
            **({} if norm_eps is None else {"norm_eps": norm_eps}),
            **({} if stem == "patch" else {"stem": stem}),
            **overrides,
        }
        if name not in timm.list_models():
            near = ", ".join(difflib.get_close_matches(name, timm.list_models("vit_*"), 3)) or "see timm.list_models()"
            raise ValueError(f"unknown encoder {name!r}, similar names: {near}")
        tokens = {"class_token": False, "reg_tokens": 0, "global_pool": "", "num_classes": 0}
        arguments = {"img_size": size, "in_chans": in_chans, **tokens, **overrides}
        try:
            vit = timm.create_model(name, **arguments)
        except (TypeError, AssertionError) as error:
            takes = ", ".join(arguments)
            raise ValueError(
                f"encoder {name!r} must be a timm VisionTransformer that takes {takes}: {error}"
            ) from error
        if not isinstance(vit, VisionTransformer):
            raise ValueError(f"encoder {name!r} must be a timm VisionTransformer, got {type(vit).__name__}")
        init_weights(vit, init)
        self.stem = stem
        if stem == "conv":
            rows, columns = vit.patch_embed.patch_size
            if rows != columns:
                raise ValueError(f"patch_size of a conv stem must be one number, got {rows} x {columns}")
            vit.patch_embed.proj = conv_stem(in_chans, vit.embed_dim, rows)
        elif patch_init == "trunc_normal":
            init_layer(vit.patch_embed.proj, "trunc_normal")
        self.vit, self.activation_checkpointing = vit, activation_checkpointing
        for layer in vit.modules() if norm_eps is not None else ():
            if isinstance(layer, nn.LayerNorm):
                layer.eps = norm_eps  # type: ignore[assignment]
        self._attentions = attentions(vit)
        self._check_patches(size)
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        self.num_patches, self.embed_dim, self.depth = vit.patch_embed.num_patches, vit.embed_dim, len(vit.blocks)
        if pos_embed == "sincos":
            self._set_sincos()
        elif vit.pos_embed is not None:
            trunc_normal(vit.pos_embed)

    def set_img_size(self, img_size: int | Sequence[int]) -> None:
        """Take images of another size from now on: fixed positions are computed anew, others interpolated (timm).

        Fixed positions of other weights, which are not this project's, are interpolated as well.

        Args:
            img_size: H and W in pixels, multiples of the patch size; one number where they are equal.

        Raises:
            ValueError: they are none.
        """
        height, width = size = _sides(img_size)
        self._check_patches(size)
        is_own = self.arguments["pos_embed"] == "sincos" and self._has_own_table()
        self.vit.set_input_size(img_size=size)
        self.grid, self.num_patches = tuple(self.vit.patch_embed.grid_size), self.vit.patch_embed.num_patches
        self.arguments["img_size"] = height if height == width else size
        if is_own:
            self._set_sincos()

    def _has_own_table(self) -> bool:
        table = self.vit.pos_embed
        assert table is not None
        own = sincos_2d(self.grid, self.embed_dim)
        return torch.allclose(table[0, -self.num_patches :].float().cpu(), own, atol=5e-3)  # half precision rounds

    def _check_patches(self, size: tuple[int, int]) -> None:
        sides = self.vit.patch_embed.patch_size
        if any(length % side for length, side in zip(size, sides, strict=True)):
            patch, got = (" x ".join(map(str, pair)) for pair in (sides, size))
            raise ValueError(f"img_size must be a multiple of the patch size {patch}, got {got}")

    @torch.no_grad()
    def _set_sincos(self) -> None:
        table = self.vit.pos_embed
        assert table is not None
        prefix = table.shape[1] - self.num_patches
        table[0, :prefix] = 0
        table[0, prefix:] = sincos_2d(self.grid, self.embed_dim)
        table.requires_grad_(False)

    def forward(self, images: Tensor, patch_idx: Tensor | None = None) -> Tensor:
        """Patch tokens after the last norm.

        Args:
            images: (B, C, H, W), normalized.
            patch_idx: (B, K), the visible patches; None: all N.

        Returns:
            (B, K, D), in the order of ``patch_idx``.
        """
        return self._features(images, patch_idx)[0]

    def features(
        self, images: Tensor, patch_idx: Tensor | None = None, depths: Sequence[float] = (1.0,)
    ) -> list[Tensor]:
        """Patch tokens (B, K, D) after each of ``depths``, fractions of the blocks in [0, 1]; 1.0 includes the last norm.

        0 stands for what comes before all blocks: the pixels of each patch, (B, K, C * height * width).
        """
        return self._features(images, patch_idx, depths)

    # Not ``features`` itself: under FSDP, both it and ``forward`` gather the parameters, and neither may call the other.
    def _features(
        self, images: Tensor, patch_idx: Tensor | None = None, depths: Sequence[float] = (1.0,)
    ) -> list[Tensor]:
        found = {0.0: self._pixels(images, patch_idx)} if 0.0 in depths else {}
        wanted = {depth: max(1, round(depth * self.depth)) for depth in depths if depth}
        if not wanted:
            return [found[0.0]] * len(depths)
        prefix = self.vit.num_prefix_tokens
        if patch_idx is not None and self.stem == "conv":
            images = hide_pixels(images, patch_idx, self.grid)
        # Masked tokens are dropped between position embeddings and blocks; timm has no public method for that.
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        if patch_idx is not None:
            tokens = torch.cat([tokens[:, :prefix], take_tokens(tokens[:, prefix:], patch_idx)], dim=1)
        tokens = self.vit.norm_pre(tokens)
        choose_kernel(self._attentions, tokens)
        after: dict[int, Tensor] = {}
        for number, block in enumerate(self.vit.blocks, start=1):
            recompute = self.activation_checkpointing and torch.is_grad_enabled()
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
            if number in wanted.values():
                after[number] = tokens
        last = self.vit.norm(tokens)
        found |= {depth: (last if depth == 1.0 else after[number])[:, prefix:] for depth, number in wanted.items()}
        return [found[depth] for depth in depths]

    def _pixels(self, images: Tensor, patch_idx: Tensor | None) -> Tensor:
        sides = self.vit.patch_embed.patch_size
        pixels = F.unfold(images, sides, stride=sides).mT
        return pixels if patch_idx is None else take_tokens(pixels, patch_idx)

    def compile_blocks(self) -> None:
        """Compile the blocks, for sequences of any length; names of parameters stay as they are."""
        for block in self.vit.blocks:
            block.compile(dynamic=True)

    def blocks_to_shard(self) -> list[nn.Module]:
        """Parts that FSDP gathers one by one."""
        return list(self.vit.blocks)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: position embeddings and prefix tokens."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}


def _sides(img_size: Any) -> tuple[int, int]:
    sides = tuple(img_size) if isinstance(img_size, (list, tuple)) else (img_size, img_size)
    if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
        raise ValueError(f"img_size must be H and W, or one positive integer, got {img_size!r}")
    return sides


class TargetEncoder(ContextEncoder):
    """An exact copy of the context encoder: float32, no gradients, always in eval mode, updated only by EMA."""

    @classmethod
    def copy_of(cls, encoder: ContextEncoder) -> TargetEncoder:
        """Copy ``encoder`` bit for bit."""
        target = copy.deepcopy(encoder)
        target.__class__ = cls
        target.requires_grad_(False).eval()
        return target  # type: ignore[return-value]

    def train(self, mode: bool = True) -> TargetEncoder:
        """Stay in eval mode: drop path would make the targets noisy."""
        super().train(False)
        return self
