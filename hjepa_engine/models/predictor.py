"""Predictor: the target features of hidden patches, at every level, from the context's tokens."""

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
    """A narrow vision transformer that answers one query per target cell and level.

    A query is mask token + level embedding + position of the cell's center. The queries of one target block attend
    to each other and to the context; blocks are predicted independently (I-JEPA, arXiv:2301.08243). A level with
    ``pool: image`` has one query per image, placed at the middle of the grid, in a sequence of its own.

    Args:
        grid: (H, W), the patch grid.
        embed_dim: D of the encoder.
        levels: the hierarchy, finest first.
        width: of the predictor's tokens, a multiple of 4 and of ``num_heads``.
        depth: number of blocks that all levels share.
        num_heads: attention heads.
        mlp_ratio: hidden width of a block's MLP, as a multiple of ``width``.
        level_depth: number of blocks that each level has of its own, after the shared ones.
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
            raise ValueError("levels must name at least one level, got none")
        if width % 4 or width % num_heads:
            raise ValueError(f"width must be a multiple of 4 and of num_heads={num_heads}, got {width}")
        self.grid, self.levels, self.activation_checkpointing = grid, tuple(levels), activation_checkpointing

        def blocks(number: int) -> nn.ModuleList:
            return nn.ModuleList(Block(width, num_heads, mlp_ratio, qkv_bias=True) for _ in range(number))

        self.embed = nn.Linear(embed_dim, width)
        # One-dimensional, so that no weight decay pulls them to zero.
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
        # A cell's center lies on a patch or half-way between two: tables in half-patch steps cover every level.
        for name, length in zip(("row_table", "column_table"), grid, strict=True):
            table = sincos_1d(torch.arange(2 * length - 1) / 2, width // 2)
            self.register_buffer(name, table, persistent=False)

    row_table: Tensor
    column_table: Tensor

    def forward(self, context: Tensor, masks: Masks) -> list[Tensor]:
        """Predict every level's targets.

        Args:
            context: (B, K, D), the context encoder's tokens of ``masks.context_idx``.
            masks: what is context and what is to be predicted.

        Returns:
            For each level (B, M, cells, D); for a level with ``pool: image`` (B, 1, 1, D).
        """
        rows, columns = masks.context_idx // self.grid[1], masks.context_idx % self.grid[1]
        tokens = self.embed(context) + self._positions(2 * rows, 2 * columns)
        cells = [number for number, level in enumerate(self.levels) if level.pool != "image"]
        image = [number for number, level in enumerate(self.levels) if level.pool == "image"]
        predictions: dict[int, Tensor] = {}
        if cells:
            queries = [self._cell_queries(number, masks) for number in cells]
            predictions.update(zip(cells, self._answer(tokens, queries, cells), strict=True))
        if image:
            middle = torch.cat([self.row_table[self.grid[0] - 1], self.column_table[self.grid[1] - 1]])
            queries = [self._queries(number, middle).expand(len(tokens), 1, 1, -1) for number in image]
            predictions.update(zip(image, self._answer(tokens, queries, image), strict=True))
        return [predictions[number] for number in range(len(self.levels))]

    def _answer(self, context: Tensor, queries: list[Tensor], numbers: list[int]) -> list[Tensor]:
        """Run queries (B, M, cells, P) of the levels ``numbers``, one sequence per block, behind the context (B, K, P)."""
        batch, blocks = queries[0].shape[:2]
        length = context.shape[1]
        sequence = torch.cat([context.repeat_interleave(blocks, dim=0), torch.cat(queries, dim=2).flatten(0, 1)], dim=1)
        sequence = self._run(self.blocks, sequence)
        shared_context, *answers = sequence.split([length, *(query.shape[2] for query in queries)], dim=1)
        outputs = []
        for number, answer in zip(numbers, answers, strict=True):
            if len(self.level_blocks[number]):  # type: ignore[arg-type]
                own = self._run(self.level_blocks[number], torch.cat([shared_context, answer], dim=1))
                answer = own[:, length:]
            outputs.append(self.heads[number](self.norm(answer)).unflatten(0, (batch, blocks)))
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
        """Sine-cosine positions (..., P) of doubled coordinates that broadcast to (...)."""
        down, across = self.row_table[rows], self.column_table[columns]
        shape = torch.broadcast_shapes(rows.shape, columns.shape)
        return torch.cat([down.expand(*shape, -1), across.expand(*shape, -1)], dim=-1)
