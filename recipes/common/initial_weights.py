"""Weights that a new run starts with."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.interop.fit import Plan, plan_weights
from hjepa_engine.interop.reading import read_source
from hjepa_engine.run.folder import RunFolder
from hjepa_engine.utils.distributed import rank_zero


def initial_weights(modules: nn.ModuleDict, folder: RunFolder) -> Callable[[], str] | None:
    """What fills the modules with the weights of ``model.init_from``, and returns a table of them; None: there are none.

    For a run that starts from the beginning, as far as can be seen, they are read and checked here: nothing is written
    where they are refused. Collective.

    Args:
        modules: of the run.
        folder: of the run; it need not exist.

    Raises:
        CheckpointError: there are no weights, or they do not fit.
    """
    model, how = folder.config.model, folder.config.checkpoint.resume
    place, parts = model.init_from, model.init_parts
    if place is None:
        return None

    def read() -> Plan:
        return plan_weights(modules, read_source(place), parts)

    if rank_zero(lambda: how == "never" or (how == "auto" and not list_checkpoints(folder.checkpoint_path))):
        return read().apply
    return lambda: read().apply()
