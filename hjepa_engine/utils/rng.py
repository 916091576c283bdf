"""Keyed randomness: every random draw is a function of its key, so no generator state has to survive a restart.

A key names a draw: ``generator(seed, "mask", step)`` yields the same numbers in any process, after any resume and with any
number of workers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

Part = int | str


def derive_seed(*parts: Part) -> int:
    """A 63-bit seed derived from all ``parts`` (BLAKE2b of their ``repr``), the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: Part) -> torch.Generator:
    """A new CPU generator, seeded with the key ``parts``."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_everything(*parts: Part) -> None:
    """Seed the global generators of Python, NumPy and torch (CPU and, once in use, GPU) with the key ``parts``."""
    value = derive_seed(*parts)
    random.seed(value)
    np.random.seed(value % 2**32)
    # torch.manual_seed() takes 0.3 ms while no GPU is in use: it formats a stack trace for each kind of GPU.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch on exit."""
    states = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def uniform_rows(first: int, count: int, width: int, *parts: Part) -> NDArray[np.float32]:
    """Rows ``first`` to ``first + count`` of an infinite table of uniform numbers in [0, 1): (count, width).

    Philox (Salmon et al., SC 2011) is counter-based: a row is computed from its index, without the rows before it.
    ``parts`` are the key of the table.
    """
    blocks = -(-width // 8)  # each counter value yields eight numbers
    bits = np.random.Philox(key=derive_seed(*parts), counter=first * blocks)
    return np.random.Generator(bits).random((count, 8 * blocks), dtype=np.float32)[:, :width]
