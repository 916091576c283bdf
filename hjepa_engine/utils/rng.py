"""Keyed randomness: every draw is a function of where it happens, so nothing random has to cross a restart.

``derive_seed(seed, "mask", step)`` names a draw; the same name gives the same numbers in any process, after any resume and
with any number of workers.
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
    """A 63-bit integer that depends on all ``parts`` (BLAKE2b of their ``repr``), the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: Part) -> torch.Generator:
    """A CPU generator of its own for the draw named by ``parts``."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_everything(*parts: Part) -> None:
    """Seed Python's, NumPy's and torch's (CPU and, once in use, GPU) global generators with the key of ``parts``."""
    value = derive_seed(*parts)
    random.seed(value)
    np.random.seed(value % 2**32)
    # torch.manual_seed() takes 0.3 ms where no GPU is in use yet: it formats a stack trace for each kind of GPU.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's global generators as they were."""
    states = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def uniform_rows(first: int, count: int, width: int, *parts: Part) -> NDArray[np.float32]:
    """Rows ``first`` to ``first + count`` of an endless table of uniform numbers in [0, 1), shape (count, width).

    Philox (Salmon et al., SC 2011) is counter-based: a row is found by its number, so a slice of the table needs no
    row before it. ``parts`` name the table.
    """
    blocks = -(-width // 8)  # one Philox counter value yields eight numbers
    bits = np.random.Philox(key=derive_seed(*parts), counter=first * blocks)
    return np.random.Generator(bits).random((count, 8 * blocks), dtype=np.float32)[:, :width]
