"""Write the trained encoder out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events
from torch import nn

from hjepa_engine.engine import StepEngine
from hjepa_engine.export import save_encoder


class EncoderExport:
    """Write the target encoder to ``folder`` when the run is over, for :func:`hjepa_engine.load_encoder`.

    Listens to: ``COMPLETED``.

    Args:
        encoder: the encoder to write.
        folder: where to; made if need be.
        description: what a user of the weights has to know (see :func:`~hjepa_engine.export.save_encoder`).
    """

    def __init__(self, encoder: nn.Module, folder: Path, description: Mapping[str, Any]) -> None:
        self.encoder, self.folder, self.description = encoder, folder, description

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.COMPLETED, self.write)

    def write(self) -> None:
        """Write now; rank 0 only."""
        if idist.get_rank() == 0:
            save_encoder(self.encoder, self.folder, self.description)
