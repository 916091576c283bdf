"""What tells the weights of an encoder from others."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_digest(encoder: nn.Module) -> str:
    """SHA-256 of all tensors and their names, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
