"""The whole state of a run: collected from a trainer, restored to one, so that it continues with the same bits."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hjepa_engine.checkpoint.folder import load_newest, load_one
from hjepa_engine.checkpoint.serialization import flatten
from hjepa_engine.checkpoint.storage import Checkpoint
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import CheckpointError
from hjepa_engine.state import Metrics
from hjepa_engine.types import unwrap
from hjepa_engine.utils.distributed import rank_zero
from hjepa_engine.utils.sharding import is_sharded, load_state

State = dict[str, Any]


def collect_state(trainer: Trainer) -> State:
    """Modules, clock, metrics, every stateful handler and the global generators, for :func:`restore_state`.

    Tensors are the live ones: copy them before the next step. Collective: all ranks must call it.
    """
    handlers = trainer.stateful_handlers()
    own = {
        "random": random_state(trainer.device),
        "handlers": {name: handler.state_dict() for name, handler in handlers.items() if _is_per_rank(handler)},
    }
    ranks: list[Any] = [own]
    if idist.get_world_size() > 1:
        ranks = [None] * idist.get_world_size()
        dist.all_gather_object(ranks, own)
    return {
        "modules": {name: unwrap(module).state_dict() for name, module in trainer.modules.items()},
        "engine": dict(trainer.state_dict()),
        "handlers": {name: handler.state_dict() for name, handler in handlers.items() if not _is_per_rank(handler)},
        "ranks": ranks,
    }


def flat_state(trainer: Trainer) -> tuple[str, dict[str, Tensor]]:
    """:func:`collect_state`, flattened for a checkpoint.

    Raises:
        CheckpointError: a handler's state holds something that cannot be saved.
    """
    try:
        state = collect_state(trainer)
        modules_in(state)
        return flatten(state)
    except TypeError as error:
        raise CheckpointError(f"the state cannot be saved: {error}") from error


def restore_state(trainer: Trainer, state: State) -> list[str]:
    """Restore what :func:`collect_state` returned to a trainer with its handlers attached.

    Returns:
        Remarks, one line each: handlers without a saved state, saved states without a handler, another number of processes.

    Raises:
        CheckpointError: a part is missing or does not fit; the first misfit is named. Nothing has changed then.
    """
    undo: list[Callable[[], None]] = []
    try:
        return _restore_state(trainer, state, undo)
    except Exception as error:
        for action in undo:
            with contextlib.suppress(Exception):  # the first error counts
                action()
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the checkpoint holds no state of a run: {_what(error)}") from error


def _restore_state(trainer: Trainer, state: State, undo: list[Callable[[], None]]) -> list[str]:
    _check_modules(trainer.modules, modules_in(state))
    handlers, ranks = trainer.stateful_handlers(), state["ranks"]
    if not ranks:
        raise ValueError("it lacks the states of its processes")
    same_processes = len(ranks) == idist.get_world_size()
    own = ranks[idist.get_rank()] if same_processes else {"handlers": _merged(handlers, ranks)}
    saved = {**state["handlers"], **own["handlers"]}
    remarks = []
    if not same_processes:
        remarks.append(f"{len(ranks)} processes wrote the checkpoint, there are {idist.get_world_size()} now")
    for name in saved.keys() - handlers.keys():
        if saved[name]:
            remarks.append(f"the state of {name} is not used: there is no such handler now")
    for name, handler in handlers.items():
        if name not in saved:
            if getattr(type(handler), "must_resume", False):
                raise CheckpointError(f"the checkpoint lacks the state of {name}")
            if handler.state_dict():
                remarks.append(f"{name} starts afresh: the checkpoint has no state of it")
            continue
        undo.append(functools.partial(handler.load_state_dict, copy.deepcopy(handler.state_dict())))
        try:
            handler.load_state_dict(saved[name])
        except (LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"the state of {name} in the checkpoint does not fit: {_what(error)}") from error
    engine = state["engine"]
    of_epoch = engine["epoch_length"] or 0  # None in a first epoch whose length was not known
    if not all(type(number) is int for number in (engine["iteration"], of_epoch, engine["optimizer_step"])):
        raise CheckpointError("the checkpoint does not say how far the run was")
    Metrics().load_state_dict(engine["metrics"])  # fails before anything is restored
    if same_processes:
        restore_random_state(own["random"], trainer.device)
    for name, module in trainer.modules.items():  # from here on nothing can fail
        load_state(unwrap(module), state["modules"][name])
    trainer.load_state_dict(engine)
    return remarks


def _merged(handlers: Mapping[str, Any], ranks: list[State]) -> State:
    """States for this rank, of handlers that can make them of those of another number of ranks."""
    found = {}
    for name, handler in handlers.items():
        states = [each["handlers"][name] for each in ranks if name in each["handlers"]]
        if _is_per_rank(handler) and len(states) == len(ranks) and hasattr(type(handler), "merge_states"):
            found[name] = handler.merge_states(states, idist.get_rank())
    return found


def _is_per_rank(handler: Any) -> bool:
    return getattr(type(handler), "per_rank", False)  # of the type: an Ignite metric has an attribute of every name


def _what(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else (str(error).splitlines() or [repr(error)])[0]


def modules_in(state: Any) -> dict[str, dict[str, Tensor]]:
    """The weights in a checkpoint's state, by module.

    Raises:
        CheckpointError: it holds none.
    """
    modules = state.get("modules") if isinstance(state, dict) else None
    parts = list(modules.values()) if isinstance(modules, dict) else [None]
    if not all(isinstance(part, dict) and all(isinstance(item, Tensor) for item in part.values()) for part in parts):
        raise CheckpointError("the checkpoint holds no weights of modules")
    return dict(modules or {})


def _check_modules(modules: nn.ModuleDict, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    if missing := modules.keys() ^ saved.keys():
        raise CheckpointError(
            f"the checkpoint has the modules {', '.join(saved)}, the run needs {', '.join(modules)} "
            f"(first difference: {min(missing)})"
        )
    for part, module in modules.items():
        wanted = unwrap(module).state_dict()
        for name in sorted(wanted.keys() | saved[part].keys()):
            if name not in saved[part]:
                raise CheckpointError(f"the checkpoint lacks the tensor {part}.{name}")
            if name not in wanted:
                raise CheckpointError(f"the checkpoint has a tensor {part}.{name} that the run has no place for")
            if saved[part][name].shape != wanted[name].shape:
                raise CheckpointError(
                    f"{part}.{name} is {tuple(saved[part][name].shape)} in the checkpoint, {tuple(wanted[name].shape)} in "
                    "the run; model.init_from takes what fits"
                )


def random_state(device: torch.device) -> State:
    """The global generators of Python, NumPy, torch and, on a GPU, of that GPU.

    Runs draw by key and do not need them; handlers that draw from them between steps do.
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, torch.tensor(internal), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: State, device: torch.device) -> None:
    """Restore what :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def resume(trainer: Trainer, folder: Path) -> tuple[Checkpoint, list[str]] | None:
    """Restore the newest usable checkpoint in ``folder``: the next ``trainer.run`` goes on from there.

    Attach all handlers first. With several processes the folder must be the same for all of them.

    Returns:
        The checkpoint and remarks (see :func:`restore_state`); None if there never was one.

    Raises:
        CheckpointError: there are checkpoints but none is usable, or they are of another run; nothing is changed.
    """
    mapped = is_sharded(trainer.modules)  # each rank copies its part alone
    found = load_on_all_ranks(lambda: load_newest(folder, mapped), mapped)
    return None if found is None else (found[0], restore_state(trainer, found[1]))


def load_on_all_ranks(
    load: Callable[[], tuple[Checkpoint, Any] | None], mapped: bool = False
) -> tuple[Checkpoint, Any] | None:
    """What ``load`` finds on rank 0; the other ranks load the same checkpoint, ``mapped`` or not. Collective."""
    found: tuple[Checkpoint, Any] | None = None

    def choose() -> Path | None:
        nonlocal found
        found = load()
        return None if found is None else found[0].path

    path = rank_zero(choose)
    return found if path is None or idist.get_rank() == 0 else load_one(path, mapped)
