"""Modules in shards (PyTorch's FSDP2): parameters, gradients and moments lie in parts, one on each process.

All that other modules need to know of it. A sharded tensor is a ``DTensor`` of the whole's shape, cut along the first
dimension as ``torch.chunk`` cuts; on one process, and under DDP, there is none, and what is here returns what it is given.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from hjepa_engine.errors import ConfigError
from hjepa_engine.utils.distributed import rank, take_from_rank_zero, world_size

#: A method that modules may be called by, besides ``forward``: parameters are gathered for it too.
_METHOD = "features"


def shard(modules: nn.ModuleDict, device: torch.device) -> nn.ModuleDict:
    """Spread the parameters of each module over all processes, in place, with the values of rank 0. Collective.

    What a module's ``blocks_to_shard()`` returns is gathered block by block while it computes, the rest of a module at
    once; a module without that method is gathered as a whole. Only calls of the module, of those blocks and of ``features``
    gather.

    Args:
        modules: on any device.
        device: where the parts lie.

    Raises:
        ConfigError: torch is too old, or a module cannot be sharded.
    """
    if inspect.signature(fully_shard).parameters["reshard_after_forward"].default is True:
        # There, the outermost parameters stay gathered behind a forward pass, and a target encoder would grow stale.
        raise ConfigError(
            f"distributed.strategy must be ddp with torch {torch.__version__}, got fsdp: it needs torch 2.8"
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    owners: dict[int, str] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            if (other := owners.setdefault(id(parameter), f"{name}.{key}")) != f"{name}.{key}":
                raise ConfigError(
                    f"distributed.strategy must be ddp where modules share parameters, as {other} and {name}.{key}, got fsdp"
                )
    for name, module in modules.items():
        take_from_rank_zero(module, device)
        if next(module.parameters(), None) is None:
            continue
        blocks: list[nn.Module] = getattr(module, "blocks_to_shard", list)()
        try:
            for part in (*blocks, module):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        except (ValueError, NotImplementedError) as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise ConfigError(f"distributed.strategy must be ddp for the module {name}, got fsdp: {reason}") from error
        if blocks:
            # Our encoders and predictor return views, which no step of ours changes in place.
            warnings.filterwarnings("ignore", f"FSDP2-wrapped module .{type(module).__name__}. returned a view tensor")
        if callable(getattr(type(module), _METHOD, None)):  # not a child of that name
            register_fsdp_forward_method(module, _METHOD)
    return modules.to(device)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module, or one of those in an ``nn.ModuleDict``, is in shards."""
    return any(isinstance(part, FSDPModule) for part in (module, *module.children()))


def exchanges_gradients(modules: nn.ModuleDict) -> bool:
    """Whether backward passes average gradients over ranks, so that one that is not finite is so on all of them."""
    return any(isinstance(module, (DistributedDataParallel, FSDPModule)) for module in modules.values())


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has, in the same memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    part: Any = tensor.detach()
    return part.to_local()


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor of all ranks' parts. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole ``tensor``, sharded as ``like`` is; the tensor itself where that is not sharded.

    Args:
        tensor: on any device, of the shape of ``like``; it may be sharded already.
        like: what it stands for.
    """
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    (placement,) = like.placements
    assert isinstance(placement, Shard)
    parts = tensor.chunk(world_size(), placement.dim)
    own = parts[rank()] if rank() < len(parts) else tensor.narrow(placement.dim, 0, 0)
    own = own.to(like.device, copy=True).contiguous()
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's whole state, on the CPU of rank 0, gathered tensor by tensor; empty on the others. Collective."""
    found = {}
    for name, tensor in module.state_dict().items():
        gathered = whole(tensor)
        if rank() == 0:
            found[name] = gathered.detach().cpu().contiguous()
    return found


def load_state(module: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """As ``module.load_state_dict``, of whole tensors: each rank takes its part."""
    wanted: Mapping[str, Any] = module.state_dict() if is_sharded(module) else {}
    parts = {name: part_of(tensor, wanted.get(name, tensor)) for name, tensor in state.items()}
    module.load_state_dict(parts, strict)


def sum_over_shards(value: Tensor) -> Tensor:
    """The sum () over all ranks of what each has computed of its parts. Collective."""
    dist.all_reduce(value)
    return value
