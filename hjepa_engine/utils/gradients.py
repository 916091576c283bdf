"""Norm and clipping of gradients, and updates that a device leaves out by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hjepa_engine.utils.sharding import local, sum_over_shards


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm () of all gradients together: bit for bit ``torch.nn.utils.get_total_norm``, in a quarter of its time.

    Args:
        gradients: on one device; all of them in shards (then this is collective), or none.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([local(each) for each in gradients])))
    return sum_over_shards(norm.square()).sqrt() if isinstance(gradients[0], DTensor) else norm


def clip_gradients(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients down to ``max_norm`` in place: ``torch.nn.utils.clip_grads_with_norm_`` in half as many operations.

    Args:
        gradients: on one device.
        norm: theirs (), from :func:`gradient_norm`.
        max_norm: larger norms become this one.
    """
    torch._foreach_div_([local(each) for each in gradients], (norm / max_norm).clamp_(min=1.0))


def can_hold(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer`` reads on the device whether to leave out a step, as torch's fused ones do (``found_inf``)."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)
