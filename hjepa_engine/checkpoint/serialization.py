"""Nested state in one safetensors file: tensors by name, everything else as JSON in its header. Nothing in it can run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hjepa_engine.utils.sharding import whole

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_METADATA = "__metadata__"
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"
_CHUNK = 16 * 2**20
_LARGEST_HEADER = 8 * 2**20  # what a larger one says may take any amount of memory


def flatten(state: Any) -> tuple[str, dict[str, Tensor]]:
    """``state`` as JSON with names instead of tensors, and the tensors by name (their path, joined by dots).

    Args:
        state: dicts with text or integer keys, lists, tuples, tensors, numbers, texts, booleans and None, nested.

    Raises:
        TypeError: it holds something else; the message says where.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            if value.dtype not in _DTYPES or value.layout != torch.strided:
                raise TypeError(f"{'.'.join(path)} is a tensor of {value.dtype}, {value.layout}, which cannot be saved")
            name = wanted = ".".join(path).encode(errors="replace").decode()  # safetensors takes no half characters
            number = len(tensors)
            while name in tensors or name == _METADATA:  # {"a.b": x, "a": {"b": y}}
                name, number = f"{wanted}#{number}", number + 1
            tensors[name] = value.detach()
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            items = {key: encode(item, (*path, str(key))) for key, item in value.items()}
            if all(type(key) is str and not key.startswith("$") for key in items):
                return items
            if all(type(key) in (str, int) for key in items):
                return {_ITEMS: [[key, item] for key, item in items.items()]}
        if isinstance(value, (list, tuple)):
            encoded = [encode(item, (*path, str(number))) for number, item in enumerate(value)]
            return encoded if isinstance(value, list) else {_TUPLE: encoded}
        raise TypeError(
            f"{'.'.join(path) or 'the state'} is of type {type(value).__name__}, which cannot be saved; allowed are "
            "tensors, numbers, texts, None, and dicts, lists and tuples of them"
        )

    try:
        structure = json.dumps(encode(state, ()))
    except RecursionError as error:
        raise TypeError("the state is nested too deeply, or contains itself") from error
    if 2 * len(structure) + 256 * len(tensors) > _LARGEST_HEADER:  # escaped, and with a line for each tensor
        raise TypeError(
            f"the state holds {len(tensors)} tensors and {len(structure) / 1e6:.1f} MB of other things, which is too much; "
            "long lists of numbers belong into a tensor"
        )
    return structure, tensors


def unflatten(structure: str, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`flatten` was given.

    Raises:
        ValueError: ``structure`` is none, or names a tensor that is not there.
    """

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(decode(item) for item in value[_TUPLE])
        items = value[_ITEMS] if _ITEMS in value else value.items()
        return {key: decode(item) for key, item in items}

    try:
        return decode(json.loads(structure))
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its structure is none: {error!r}") from error


class Snapshot:
    """Copies of tensors on the CPU, in memory that is used again: the first copy of a state takes longest."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
        """Copy ``tensors``; the copies are good until the next call. Collective where they are in shards.

        Args:
            tensors: sharded ones are gathered one by one.
            keep: whether this process copies; one that does not takes part in the gathering, and returns nothing.
        """
        old, self._buffers = self._buffers, {}
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        for name, live in tensors.items():
            tensor = whole(live)
            if not keep:
                continue
            buffer = old.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in devices:
            torch.cuda.synchronize(device)
        return dict(self._buffers)


def write_tensors(write: Callable[[Any], None], structure: str, tensors: Mapping[str, Tensor]) -> None:
    """Send a safetensors file with ``tensors`` (on the CPU) and ``structure`` to ``write``, piece by piece.

    safetensors itself writes a file in one go, which leaves no room for a digest and hides the number of an error.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: dict[str, Any] = {_METADATA: {"structure": structure}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little") + text)
    for name in order:
        data = memoryview(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        for start in range(0, len(data), _CHUNK):
            write(data[start : start + _CHUNK])


def read_tensors(path: Path, mapped: bool = False) -> tuple[str, dict[str, Tensor]]:
    """The structure and the tensors of a file, on the CPU.

    Args:
        path: of the file.
        mapped: leave the tensors in the file, mapped into memory: for whoever copies parts of them, soon. Else they are
            independent of it.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with open(path, "rb") as head:
            size = int.from_bytes(head.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(f"its header claims {size} bytes")
        with safe_open(path, framework="pt", device="cpu") as file:
            structure = (file.metadata() or {}).get("structure")
            if structure is None:
                raise ValueError("it has no structure")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return structure, tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}
    except (SafetensorError, RuntimeError, MemoryError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError((str(error).splitlines() or [repr(error)])[0]) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait for its writer
    try:
        while piece := os.read(descriptor, _CHUNK):
            digest.update(piece)
    finally:
        os.close(descriptor)
    return digest.hexdigest()
