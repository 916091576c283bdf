"""Frozen features as they are gathered: in memory, or beyond a limit in memory-mapped files."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hjepa_engine.errors import DataError


class FeatureStore:
    """Rows of several tensors, added batch by batch.

    Tensors beyond ``max_bytes`` are those of a file in the folder for temporary files (``TMPDIR``), mapped into memory:
    the system keeps as much of it in memory as is free. They are the same tensors to whoever reads them. The file has no
    name any more once it is open, so that nothing is left behind, however the process ends.

    Args:
        capacity: the largest number of rows.
        max_bytes: what all tensors together may take of memory.
    """

    def __init__(self, capacity: int, max_bytes: float) -> None:
        self.capacity, self.max_bytes = capacity, max_bytes
        self.count, self.is_mapped = 0, False
        self._tensors: dict[str, Tensor] = {}

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Add as many rows, (B, ...), of each tensor; the first call says which tensors there are, and their shapes.

        Raises:
            DataError: there is no room on the disk.
        """
        if not self._tensors:
            needed = sum(self.capacity * row[0].numel() * row.element_size() for row in rows.values())
            self.is_mapped = needed > self.max_bytes
            allocate = _mapped if self.is_mapped else torch.empty
            self._tensors = {
                name: allocate((self.capacity, *row.shape[1:]), dtype=row.dtype) for name, row in rows.items()
            }
        number = len(next(iter(rows.values())))
        for name, tensor in self._tensors.items():
            tensor[self.count : self.count + number] = rows[name]
        self.count += number

    def tensors(self) -> dict[str, Tensor]:
        """What was added, (rows, ...), by name."""
        return {name: tensor[: self.count] for name, tensor in self._tensors.items()}


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in a file without a name."""
    numbers = math.prod(shape)
    size = numbers * dtype.itemsize
    folder = Path(tempfile.gettempdir())
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="features_") as file:
            # Without blocks of its own, a disk that is full later would end the process by a signal. macOS has no such call.
            reserve = getattr(os, "posix_fallocate", lambda file, start, length: os.ftruncate(file, start + length))
            reserve(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=numbers, dtype=dtype).view(shape)
    except OSError as error:
        raise DataError(
            f"features take {size / 1e9:.1f} GB, more than probe.features_in_memory_gb, and do not fit into {folder} "
            f"({error.strerror}); set TMPDIR to a folder with more room"
        ) from error
