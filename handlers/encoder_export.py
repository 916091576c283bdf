"""Export the trained encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Events
from torch import nn

from hjepa_engine.engine import StepEngine
from hjepa_engine.export import save_encoder


class EncoderExport:
    """Export an encoder when the run ends, for :func:`hjepa_engine.load_encoder`.

    Listens to: ``COMPLETED``.

    Args:
        encoder: the encoder to export.
        folder: output folder, created if it does not exist.
        description: contents of its ``config.json`` (see :func:`~hjepa_engine.export.save_encoder`).
    """

    def __init__(self, encoder: nn.Module, folder: Path, description: Mapping[str, Any]) -> None:
        self.encoder, self.folder, self.description = encoder, folder, description

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.COMPLETED, self.write)

    def write(self) -> None:
        """Export now, on rank 0. Collective where the encoder is in shards."""
        save_encoder(self.encoder, self.folder, self.description)
