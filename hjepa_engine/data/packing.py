"""Pack an image folder: its files, in their order, as shards that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

from hjepa_engine.data.arrow import quiet_datasets
from hjepa_engine.data.layout import Layout, Part
from hjepa_engine.data.packed import PACK
from hjepa_engine.data.repack import Packed, pack_image
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.utils.files import replace_file
from hjepa_engine.utils.rng import path_hash

DAMAGED = "damaged.txt"
#: Bytes of images that are written at once.
_BATCH = 2**25


class Shard(NamedTuple):
    """Some files of a split, one behind the other."""

    name: str
    part: Part
    first: int
    last: int


class Summary(NamedTuple):
    """What was packed."""

    images: int
    damaged: int


def pack(
    root: Path,
    layout: Layout,
    target: Path,
    options: dict[str, Any],
    workers: int = 0,
    show: Callable[[int], None] = lambda images: None,
) -> Summary:
    """Pack the images of a folder, or go on where an earlier call was stopped.

    Args:
        root: the image folder.
        layout: its splits and classes.
        target: folder of the shards; empty, or begun with the same options.
        options: ``size`` and ``quality`` of :func:`pack_image`, ``shard_mb``, and whatever else the layout follows from.
        workers: threads that read and decode; 0: this one.
        show: called with the number of images that are done.

    Raises:
        ConfigError: the target holds something else.
        DataError: all images are damaged, or the disk is full.
    """
    plan = {"options": options, "source": _fingerprint(layout), "classes": list(layout.classes)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        begun = _begun(target, plan)
        shards = [*_cut("train", layout.train, options["shard_mb"])]
        if layout.val is not None:
            shards += _cut("val", layout.val, options["shard_mb"])
        if begun is None:
            replace_file(target / PACK, json.dumps(plan, indent=2))
        with quiet_datasets(str(target)) as library, _mapping(workers) as run:
            for shard in shards:
                if not (target / shard.name).exists():
                    _write_shard(library, run, root, shard, target, plan, show)
                else:
                    show(shard.last - shard.first)
            return _finish(library, target, shards, plan)
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror or error}") from error


def _fingerprint(layout: Layout) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (layout.train, layout.val):
        for file in part.files if part else ():
            digest.update(f"{file.path}\0{file.size}\0".encode("utf-8", "surrogateescape"))
        digest.update(b"\1")
    return digest.hexdigest()


def _begun(target: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The plan that the target was begun with; None: it is empty."""
    if not (target / PACK).exists():
        if others := sorted(path.name for path in target.iterdir() if not path.name.startswith(".")):
            raise ConfigError(f"DST {target} must be empty, or begun by the same command, but holds {others[0]}")
        return None
    found: dict[str, Any] = json.loads((target / PACK).read_text(encoding="utf-8"))
    for name, value in plan["options"].items():
        if (earlier := found["options"].get(name)) != value:
            raise ConfigError(f"--{name} must be {earlier}, with which {target} was begun, got {value}")
    if any(found[name] != plan[name] for name in ("source", "classes")):
        raise ConfigError(f"SRC has other images than when {target} was begun; pack it into another folder")
    return found


def _cut(split: str, part: Part, megabytes: int) -> Iterator[Shard]:
    """Shards of at least so many megabytes of files each, the last one aside."""
    ends, total = [0], 0
    for index, file in enumerate(part.files, 1):
        total += file.size
        if total >= megabytes * 2**20:
            ends.append(index)
            total = 0
    if ends[-1] < len(part.files):
        ends.append(len(part.files))
    for number, (first, last) in enumerate(pairwise(ends)):
        yield Shard(f"{split}-{number:05}.arrow", part, first, last)


def _write_shard(
    library: Any,
    run: Callable[[Any, Iterable[str]], Iterable[Packed]],
    root: Path,
    shard: Shard,
    target: Path,
    plan: dict[str, Any],
    show: Callable[[int], None],
) -> None:
    from datasets.arrow_writer import ArrowWriter

    classes, part = plan["classes"], shard.part
    features = library.Features(
        image=library.Image(),
        label=library.ClassLabel(names=classes) if classes else library.Value("int64"),
        path_hash=library.Value("int64"),
    )
    files = part.files[shard.first : shard.last]
    work = partial(pack_image, size=plan["options"]["size"], quality=plan["options"]["quality"])
    temporary, damaged, pending = target / f".{shard.name}.part", [], 0
    try:
        with ArrowWriter(path=str(temporary), features=features, writer_batch_size=1000) as writer:
            for index, packed in enumerate(run(work, (f"{part.root}/{file.path}" for file in files))):
                path = Path(os.path.relpath(part.root / files[index].path, root)).as_posix()
                label = -1 if part.labels is None else part.labels[shard.first + index]
                show(1)
                if packed.reason is not None:
                    damaged.append(f"{_printable(path)}: {packed.reason}\n")
                    continue
                image = {"bytes": packed.content, "path": _printable(path)}
                writer.write({"image": image, "label": label, "path_hash": _signed(path_hash(path))})
                pending += len(packed.content)
                if pending > _BATCH:
                    writer.write_examples_on_file()
                    pending = 0
            writer.finalize()
        with (target / DAMAGED).open("a", encoding="utf-8") as file:
            file.writelines(damaged)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.rename(target / shard.name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _finish(library: Any, target: Path, shards: list[Shard], plan: dict[str, Any]) -> Summary:
    rows = sum(len(library.Dataset.from_file(str(target / shard.name))) for shard in shards)
    planned = sum(shard.last - shard.first for shard in shards)
    if not rows:
        raise DataError(f"all {planned} images are damaged: see {target / DAMAGED}")
    lines = (target / DAMAGED).read_text(encoding="utf-8").splitlines(keepends=True)
    replace_file(target / DAMAGED, "".join(dict.fromkeys(lines)))  # a shard that was begun twice has noted them twice
    sizes = {shard.name: (target / shard.name).stat().st_size for shard in shards}
    splits = {
        split: [[name, size] for name, size in sizes.items() if name.startswith(f"{split}-")]
        for split in ("train", "val")
    }
    replace_file(target / PACK, json.dumps({**plan, "damaged": planned - rows, "splits": splits}, indent=2))
    return Summary(rows, planned - rows)


def _signed(number: int) -> int:
    """The 64 bits of a hash as a signed number: the library takes no others."""
    return number - (number >> 63 << 64)


def _printable(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[[Any, Iterable[str]], Iterable[Packed]]]:
    """A ``map`` over threads: Pillow decodes and encodes without Python's lock."""
    if not workers:
        yield map
        return
    with ThreadPool(workers) as pool:
        yield pool.imap
