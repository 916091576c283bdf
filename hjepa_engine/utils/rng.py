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
_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
#: Philox's multipliers, and what its two key words grow by in each round.
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)


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


def keyed_uniform(keys: NDArray[np.int64], width: int, *parts: Part) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1) for each of several keys: (B, width).

    A row is a function of ``parts`` and of its own key, whichever keys are beside it.

    Args:
        keys: (B, 2), a sample's epoch (below 2**32) and index, both from 0.
        width: numbers per key.
        *parts: names the draw.
    """
    number, blocks = len(keys), -(-width // 4)
    epochs, indices = (np.repeat(keys[:, column].astype(np.uint64), blocks) for column in (0, 1))
    block = np.tile(np.arange(blocks, dtype=np.uint64), number)
    words = philox(np.stack([block, epochs, indices & _WORD, indices >> _HALF]), derive_seed(*parts))
    # 24 bits, as many as the fraction of a float32 has: 1.0 cannot come up.
    return (words.T.reshape(number, 4 * blocks)[:, :width] >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def path_hash(path: str) -> int:
    """A 64-bit hash of a relative path with forward slashes (BLAKE2b), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def in_validation(hashes: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Whether a sample is held out, by its own hash (:func:`path_hash`) and ``seed`` alone: other samples do not matter.

    Args:
        hashes: (N,).
        fraction: share held out, on average.
        seed: of the run.
    """
    words = hashes.astype(np.uint64)
    zeros = np.zeros_like(words)
    drawn = philox(np.stack([zeros, zeros, words & _WORD, words >> _HALF]), derive_seed(seed, "validation split"))[0]
    return drawn < np.uint64(min(round(fraction * 2**32), 2**32))


def philox(counters: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., SC 2011) of many counters at once.

    Args:
        counters: (4, n), words of 32 bits.
        key: 64 bits.

    Returns:
        Random words of 32 bits, (4, n).
    """
    even, odd = counters[::2], counters[1::2]
    keys = np.array([[key & 0xFFFFFFFF], [key >> 32]], dtype=np.uint64)
    for _ in range(10):
        products = (even * _MULTIPLIERS)[::-1]
        even, odd = (products >> _HALF) ^ (odd ^ keys), products & _WORD
        keys = (keys + _WEYL) & _WORD
    return np.stack([even[0], odd[0], even[1], odd[1]])
