"""Where a run computes: device, precision, compiler, processes."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import ignite.distributed as idist
import torch
from torch import nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous
from torch.nn.parallel import DistributedDataParallel

from hjepa_engine.config.describe import truncate
from hjepa_engine.config.schema import Config, TrainingConfig
from hjepa_engine.errors import ConfigError
from hjepa_engine.utils.arithmetic import fastest_dtype
from hjepa_engine.utils.causes import explain, share_causes
from hjepa_engine.utils.sharding import shard

logger = logging.getLogger(__name__)


#: Where the processes of a group meet: as torch's own ``env://``, and apart from what a former attempt has left there.
_SCHEME = "hjepa-env"


def _meet(url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
    store, rank, size = next(iter(rendezvous(url.replace(_SCHEME, "env", 1), **options)))
    # ``torchrun --max-restarts`` keeps one store for all attempts: the addresses in it are of processes that are gone.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    share_causes(PrefixStore(f"causes of attempt {attempt}", store))
    yield PrefixStore(f"attempt {attempt}", store), rank, size


register_rendezvous_handler(_SCHEME, _meet)


@contextmanager
def process_group(device: str, timeout: float | None = None) -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if it has; leave together when one of them fails.

    Args:
        device: as the configuration names it.
        timeout: minutes that a collective operation may wait for the slowest process; None: torch's default.

    Raises:
        PeerEnded: another process has ended, with or without telling why.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "nccl" if choose_device(device).type == "cuda" else "gloo"
    limit = {} if timeout is None else {"timeout": timedelta(minutes=timeout)}
    idist.initialize(backend, init_method=f"{_SCHEME}://", **limit)
    try:
        yield
    except BaseException as raised:
        error = explain(raised)
        if error is raised:
            raise
        raise error from raised
    finally:
        share_causes(None)
        idist.finalize()


def choose_device(name: str) -> torch.device:
    """The device that ``name`` asks for; of several GPUs, the one of this process.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    number = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= number:
        raise ConfigError(f"device must exist: {name} was asked for, CUDA devices here: {number}")
    if device.type == "cuda" and idist.get_world_size() > 1:
        if device.index is not None or idist.get_local_rank() >= number:
            raise ConfigError(
                f"device must be cuda, with a GPU for each process of a machine ({number} here), got {name}"
            )
        return torch.device("cuda", idist.get_local_rank())
    return device


def choose_amp_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in; None without mixed precision."""
    if training.use_amp == "auto":
        found = fastest_dtype(device)
        return None if found == torch.float32 else found
    if not training.use_amp:
        return None
    if training.amp_dtype != "auto":
        return torch.bfloat16 if training.amp_dtype == "bfloat16" else torch.float16
    return torch.bfloat16 if device.type != "cuda" or fastest_dtype(device) == torch.bfloat16 else torch.float16


def fix_precision(config: Config) -> Config:
    """The configuration with the precision that its devices are fastest in, if it asks for that; equal on all ranks."""
    training = config.training
    if training.use_amp != "auto":
        return config
    names: tuple[Literal["bfloat16", "float16"], ...] = ("bfloat16", "float16")
    found = fastest_dtype(choose_device(config.device))
    number = [torch.bfloat16, torch.float16, torch.float32].index(found)
    # Processes may run on different machines: the type that is right for the least of them.
    chosen = int(idist.all_reduce(number, "MAX"))
    if chosen == len(names):
        return replace(config, training=replace(training, use_amp=False))
    return replace(config, training=replace(training, use_amp=True, amp_dtype=names[chosen]))


def compile_modules(modules: nn.ModuleDict, device: torch.device) -> bool:
    """Compile modules in place: blocks one by one where a module has ``compile_blocks()``, others as a whole.

    Returns:
        Whether there is a compiler that works; without one, nothing has changed and a warning has been logged.
    """
    try:
        torch.compile(lambda tensor: tensor + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of Dynamo, Inductor, Triton or the compiler itself
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("training.compile: no compiler works here, the run goes on without: %s", truncate(reason, 100))
        return False
    for module in modules.values():
        compile_blocks = getattr(module, "compile_blocks", None)
        if compile_blocks is not None:
            compile_blocks()
        else:
            module.compile(dynamic=True)
    return True


def distribute(modules: nn.ModuleDict, device: torch.device, strategy: Literal["ddp", "fsdp"] = "ddp") -> nn.ModuleDict:
    """Move modules to ``device``; with several processes, wrap the trained ones in DDP, or spread all in shards (FSDP)."""
    if strategy == "fsdp" and idist.get_world_size() > 1:
        return shard(modules, device)
    modules = modules.to(device)
    if idist.get_world_size() > 1:
        # Its name since PyTorch 2.14; the former one is deprecated.
        named = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        buffers = {"forward_sync_buffers" if named else "broadcast_buffers": False}
        for name, module in modules.items():
            if any(parameter.requires_grad for parameter in module.parameters()):
                ids = [device] if device.type == "cuda" else None
                modules[name] = DistributedDataParallel(module, ids, **buffers)  # type: ignore[arg-type]
    return modules
