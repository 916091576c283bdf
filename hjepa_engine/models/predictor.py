"""Predictor of target features of masked patches, at every level, from context tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hjepa_engine.config.schema import Level
from hjepa_engine.levels import cell_centers
from hjepa_engine.masking import Masks
from hjepa_engine.models.attention import attentions, choose_kernel, run_queries
from hjepa_engine.models.init import Init, init_weights, trunc_normal
from hjepa_engine.models.positions import sincos_1d


class Predictor(nn.Module):
    """A narrow vision transformer with one query token per target cell and level.

    A query is mask token + level embedding (where there are several levels) + position embedding of the cell's center. A
    level with ``pool: image`` has one query per image, at the center of the grid.

    Args:
        grid: (H, W), the patch grid.
        embed_dim: D of the encoder.
        levels: levels of the hierarchy, finest first.
        width: dimension of the predictor's tokens, a multiple of 4 and of ``num_heads``.
        depth: number of blocks shared by all levels.
        num_heads: attention heads.
        mlp_ratio: hidden width of a block's MLP, as a multiple of ``width``.
        level_depth: number of additional blocks per level, after the shared ones.
        targets: ``independent``: the queries of one target block attend to each other and to the context, as in I-JEPA
            (arXiv:2301.08243), and those of a level with ``pool: image`` to the context alone; ``joint``: all queries of an
            image are one sequence, so that the context is read once (V-JEPA, arXiv:2404.08471).
        num_pixels: of a patch, in all channels: what a level with ``depth: 0`` predicts.
        init: initial weights of the linear layers, see :func:`~hjepa_engine.models.init.init_layer`.
        activation_checkpointing: recompute activations in the backward pass to save memory.
    """

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        embed_dim: int,
        levels: Sequence[Level],
        width: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        level_depth: int = 0,
        targets: Literal["independent", "joint"] = "independent",
        num_pixels: int = 0,
        init: Init = "xavier",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not levels:
            raise ValueError("levels must not be empty")
        if num_pixels < 1 and not all(level.depth for level in levels):
            raise ValueError(f"num_pixels must be positive where a level has depth 0, got {num_pixels}")
        if width % 4 or width % num_heads:
            raise ValueError(f"width must be a multiple of 4 and of num_heads={num_heads}, got {width}")
        self.grid, self.levels, self.targets = grid, tuple(levels), targets
        self.activation_checkpointing = activation_checkpointing

        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # as the encoder's

        def blocks(number: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(number)
            )

        self.embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # A single one would get the mask token's gradient, and double its learning rate. One-dimensional: no weight decay.
        self.level_embed = nn.ParameterList(torch.zeros(width) for _ in levels if len(levels) > 1)
        self.blocks, self.norm = blocks(depth), norm(width)
        self.level_blocks = nn.ModuleList(blocks(level_depth) for _ in levels)
        self.heads = nn.ModuleList(nn.Linear(width, embed_dim if level.depth else num_pixels) for level in levels)
        self._attentions, self._run_queries = attentions(self), run_queries
        for parameter in (self.mask_token, *self.level_embed):
            trunc_normal(parameter)
        init_weights(self, init)
        # Centers of cells are on a patch or half-way between two: tables in steps of half a patch serve all levels.
        for name, length in zip(("row_table", "column_table"), grid, strict=True):
            table = sincos_1d(torch.arange(2 * length - 1) / 2, width // 2)
            self.register_buffer(name, table, persistent=False)

    row_table: Tensor
    column_table: Tensor

    def forward(self, context: Tensor, masks: Masks) -> list[Tensor]:
        """Predict every level's targets.

        Args:
            context: (B, K, D), context encoder tokens at ``masks.context_idx``.
            masks: indices of context and target patches.

        Returns:
            One tensor per level: (B, M, cells, D), or (B, 1, 1, D) for ``pool: image``; of pixels, ``num_pixels`` for D.
        """
        rows, columns = masks.context_idx // self.grid[1], masks.context_idx % self.grid[1]
        tokens = self.embed(context) + self._positions(2 * rows, 2 * columns)
        queries = [self._level_queries(number, masks, len(tokens)) for number in range(len(self.levels))]
        if self.targets == "joint":
            together = [level.flatten(1, 2)[:, None] for level in queries]
            outputs = self._predict(tokens, together, range(len(queries)))
            return [output.view(*level.shape[:3], -1) for output, level in zip(outputs, queries, strict=True)]
        cells = [number for number, level in enumerate(self.levels) if level.pool != "image"]
        image = [number for number, level in enumerate(self.levels) if level.pool == "image"]
        predictions: dict[int, Tensor] = {}
        for numbers in (cells, image):
            if numbers:
                outputs = self._predict(tokens, [queries[number] for number in numbers], numbers)
                predictions.update(zip(numbers, outputs, strict=True))
        return [predictions[number] for number in range(len(self.levels))]

    def _predict(self, context: Tensor, queries: list[Tensor], numbers: Sequence[int]) -> list[Tensor]:
        """Run queries (B, G, cells, P) of levels ``numbers`` after the context (B, K, P), each of G groups on its own."""
        batch, groups = queries[0].shape[:2]
        tokens, lengths = torch.cat(queries, dim=2), [query.shape[2] for query in queries]
        blocks, own_blocks = list(self.blocks), [list(level.children()) for level in self.level_blocks]
        level_depth = len(own_blocks[0])
        whole = blocks if level_depth else blocks[:-1]
        if whole:
            # From the second block on, the context is another one in each group: it has attended to the group's queries.
            context = context.repeat_interleave(groups, dim=0)
            context, tokens = self._run_whole(whole, context, tokens.flatten(0, 1))
            tokens = tokens[:, None]
        if not level_depth:
            tokens = self._run(partial(self._run_queries, blocks[-1]), context, tokens)
        outputs = []
        for number, own in zip(numbers, tokens.split(lengths, dim=2), strict=True):
            if level_depth:
                inner = own_blocks[number]
                seen, inside = self._run_whole(inner[:-1], context, own[:, 0])
                own = self._run(partial(self._run_queries, inner[-1]), seen, inside[:, None])
            outputs.append(self.heads[number](self.norm(own)).view(batch, groups, own.shape[2], -1))
        return outputs

    def _run_whole(self, blocks: Sequence[nn.Module], context: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run blocks on context (n, K, P) and tokens (n, Q, P) as one sequence."""
        if not blocks:
            return context, tokens
        length, sequence = context.shape[1], torch.cat([context, tokens], dim=1)
        choose_kernel(self._attentions, sequence)
        for block in blocks:
            sequence = self._run(block, sequence)
        return sequence[:, :length], sequence[:, length:]

    def compile_blocks(self) -> None:
        """Compile the blocks, for sequences of any length; names of parameters stay as they are."""
        for block in (*self.blocks, *(block for level in self.level_blocks for block in level.children())):
            block.compile(dynamic=True)
        self._run_queries = torch.compile(run_queries, dynamic=True)

    def blocks_to_shard(self) -> list[nn.Module]:
        """Parts that FSDP gathers one by one: not a last block, which is not called but taken apart for its queries."""
        stacks = [list(level.children()) for level in self.level_blocks]
        has_own = any(stacks)
        return [*list(self.blocks)[: None if has_own else -1], *(block for stack in stacks for block in stack[:-1])]

    def _run(self, block: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *tokens, use_reentrant=False)
        return block(*tokens)

    def _level_queries(self, number: int, masks: Masks, batch: int) -> Tensor:
        """Queries (B, M, cells, P), or (B, 1, 1, P) for ``pool: image``."""
        pool = self.levels[number].pool
        if pool == "image":
            middle = torch.cat([self.column_table[self.grid[1] - 1], self.row_table[self.grid[0] - 1]])
            return self._queries(number, middle).expand(batch, 1, 1, -1)
        rows, columns = cell_centers(masks, pool, self.grid[1])
        return self._queries(number, self._positions(rows[..., :, None], columns[..., None, :]).flatten(2, 3))

    def _queries(self, number: int, positions: Tensor) -> Tensor:
        token = self.mask_token.flatten()
        return (token + self.level_embed[number] if self.level_embed else token) + positions

    def _positions(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Sine-cosine position embeddings (..., P) of coordinates in half patches, which broadcast to (...)."""
        down, across = self.row_table[rows], self.column_table[columns]
        shape = torch.broadcast_shapes(rows.shape, columns.shape)
        return torch.cat([across.expand(*shape, -1), down.expand(*shape, -1)], dim=-1)
