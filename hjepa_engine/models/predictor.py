"""Predictor of target features of masked patches, at every level, from context tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hjepa_engine.config.schema import Level
from hjepa_engine.levels import cell_centers
from hjepa_engine.masking import Masks
from hjepa_engine.models.positions import sincos_1d


class Predictor(nn.Module):
    """A narrow vision transformer with one query token per target cell and level.

    A query is mask token + level embedding + position embedding of the cell's center. The queries of one target block
    attend to each other and to the context; blocks are predicted independently (I-JEPA, arXiv:2301.08243). A level with
    ``pool: image`` has one query per image, at the center of the grid, in a separate sequence.

    Args:
        grid: (H, W), the patch grid.
        embed_dim: D of the encoder.
        levels: levels of the hierarchy, finest first.
        width: dimension of the predictor's tokens, a multiple of 4 and of ``num_heads``.
        depth: number of blocks shared by all levels.
        num_heads: attention heads.
        mlp_ratio: hidden width of a block's MLP, as a multiple of ``width``.
        level_depth: number of additional blocks per level, after the shared ones.
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
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not levels:
            raise ValueError("levels must not be empty")
        if width % 4 or width % num_heads:
            raise ValueError(f"width must be a multiple of 4 and of num_heads={num_heads}, got {width}")
        self.grid, self.levels, self.activation_checkpointing = grid, tuple(levels), activation_checkpointing

        def blocks(number: int) -> nn.ModuleList:
            return nn.ModuleList(Block(width, num_heads, mlp_ratio, qkv_bias=True) for _ in range(number))

        self.embed = nn.Linear(embed_dim, width)
        # One-dimensional, so that weight decay does not apply.
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.level_embed = nn.ParameterList(torch.zeros(width) for _ in levels)
        self.blocks, self.norm = blocks(depth), nn.LayerNorm(width)
        self.level_blocks = nn.ModuleList(blocks(level_depth) for _ in levels)
        self.heads = nn.ModuleList(nn.Linear(width, embed_dim) for _ in levels)
        for parameter in (self.mask_token, *self.level_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
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
            One tensor per level: (B, M, cells, D), or (B, 1, 1, D) for ``pool: image``.
        """
        rows, columns = masks.context_idx // self.grid[1], masks.context_idx % self.grid[1]
        tokens = self.embed(context) + self._positions(2 * rows, 2 * columns)
        cells = [number for number, level in enumerate(self.levels) if level.pool != "image"]
        image = [number for number, level in enumerate(self.levels) if level.pool == "image"]
        predictions: dict[int, Tensor] = {}
        if cells:
            queries = [self._cell_queries(number, masks) for number in cells]
            predictions.update(zip(cells, self._predict(tokens, queries, cells), strict=True))
        if image:
            middle = torch.cat([self.row_table[self.grid[0] - 1], self.column_table[self.grid[1] - 1]])
            queries = [self._queries(number, middle).expand(len(tokens), 1, 1, -1) for number in image]
            predictions.update(zip(image, self._predict(tokens, queries, image), strict=True))
        return [predictions[number] for number in range(len(self.levels))]

    def _predict(self, context: Tensor, queries: list[Tensor], numbers: list[int]) -> list[Tensor]:
        """Run queries (B, M, cells, P) of levels ``numbers`` after the context (B, K, P), one sequence per block."""
        batch, blocks = queries[0].shape[:2]
        length = context.shape[1]
        sequence = torch.cat([context.repeat_interleave(blocks, dim=0), torch.cat(queries, dim=2).flatten(0, 1)], dim=1)
        sequence = self._run(self.blocks, sequence)
        shared_context, *outputs_by_level = sequence.split([length, *(query.shape[2] for query in queries)], dim=1)
        outputs = []
        for number, tokens in zip(numbers, outputs_by_level, strict=True):
            if len(self.level_blocks[number]):  # type: ignore[arg-type]
                own = self._run(self.level_blocks[number], torch.cat([shared_context, tokens], dim=1))
                tokens = own[:, length:]
            outputs.append(self.heads[number](self.norm(tokens)).unflatten(0, (batch, blocks)))
        return outputs

    def _run(self, blocks: nn.Module, tokens: Tensor) -> Tensor:
        for block in blocks.children():
            recompute = self.activation_checkpointing and torch.is_grad_enabled()
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
        return tokens

    def _cell_queries(self, number: int, masks: Masks) -> Tensor:
        pool = self.levels[number].pool
        assert isinstance(pool, int)
        rows, columns = cell_centers(masks, pool, self.grid[1])
        return self._queries(number, self._positions(rows[..., :, None], columns[..., None, :]).flatten(2, 3))

    def _queries(self, number: int, positions: Tensor) -> Tensor:
        return self.mask_token + self.level_embed[number] + positions

    def _positions(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Sine-cosine position embeddings (..., P) of coordinates in half patches, which broadcast to (...)."""
        down, across = self.row_table[rows], self.column_table[columns]
        shape = torch.broadcast_shapes(rows.shape, columns.shape)
        return torch.cat([down.expand(*shape, -1), across.expand(*shape, -1)], dim=-1)
