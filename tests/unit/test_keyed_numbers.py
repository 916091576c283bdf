"""Random numbers that are functions of their key."""

import numpy as np
import pytest

from hjepa_engine.utils.rng import in_validation, keyed_uniform, path_hash, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    """Known answers of Random123, the library of the paper."""
    words = philox(np.array(counter, np.uint64)[:, None], key)[:, 0]
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def keys(epoch, indices):
    return np.stack([np.full(len(indices), epoch), np.array(indices)], axis=1)


def test_numbers_depend_on_their_own_key_alone():
    together = keyed_uniform(keys(3, [5, 9, 2**40, 7]), 6, 0, "crop")
    for row, index in zip(together, [5, 9, 2**40, 7], strict=True):
        assert (keyed_uniform(keys(3, [index]), 6, 0, "crop")[0] == row).all()
    assert (keyed_uniform(keys(3, [5]), 2, 0, "crop")[0] == together[0, :2]).all()
    others = [
        (keys(4, [5]), 0, "crop"),
        (keys(3, [6]), 0, "crop"),
        (keys(3, [5]), 1, "crop"),
        (keys(3, [5]), 0, "flip"),
    ]
    assert not any((keyed_uniform(key, 6, seed, name)[0] == together[0]).any() for key, seed, name in others)


def test_numbers_are_uniform_and_independent():
    drawn = keyed_uniform(keys(0, range(50_000)), 8, 0, "any")
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 0.006 and np.abs(drawn.var(axis=0) - 1 / 12).max() < 0.002
    assert np.abs(np.corrcoef(drawn.T) - np.eye(8)).max() < 0.02


def test_a_path_is_held_out_or_not_whatever_else_there_is():
    hashes = np.array([path_hash(f"cat/{number}.jpg") for number in range(10_000)], np.uint64)
    held = in_validation(hashes, 0.2, seed=0)
    assert 1900 < held.sum() < 2100
    assert (in_validation(hashes[::3], 0.2, seed=0) == held[::3]).all()
    assert (held <= in_validation(hashes, 0.3, seed=0)).all()  # a larger share keeps what was held out
    assert (in_validation(hashes, 0.2, seed=1) != held).any()


def test_hashes_of_paths_never_change():
    assert [path_hash(name) for name in ("cat/0.jpg", "ä.png")] == [2068444478964862276, 350805166826281582]
