"""Pack an image folder into a few memory-mapped files, optionally with smaller images.

    python recipes/pack.py SRC DST [--size 256] [--workers 4]
    python recipes/pretrain.py --data.dataset packed --data.data_path DST

Splits, classes and order are those of the image folder, so a run sees the same images; without --size, the same bytes. The
same command goes on where it was stopped. Damaged files are listed in DST/damaged.txt and not packed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hjepa_engine.config import paths
from hjepa_engine.errors import ConfigError
from hjepa_engine.run.cli import command_parser, run_command


def main(argv: Sequence[str]) -> None:
    """Pack a folder."""
    parser = command_parser(__doc__ or "", with_config=False)
    parser.add_argument("src", type=paths.path_argument, metavar="SRC", help="the image folder")
    parser.add_argument(
        "dst", type=paths.path_argument, metavar="DST", help="a new folder, or one that this command has begun"
    )
    parser.add_argument("--size", type=int, metavar="N", help="shorter side of larger images; as they are by default")
    parser.add_argument(
        "--quality", type=int, default=90, help="of JPEG, from 1 to 95, where images are made smaller (90)"
    )
    parser.add_argument("--shard_mb", type=int, default=256, help="megabytes of image files in a shard (256)")
    parser.add_argument("--workers", type=int, default=0, help="threads that decode (0: the main one)")
    parser.add_argument("--train_dir", help="as data.train_dir")
    parser.add_argument("--val_dir", help="as data.val_dir")
    parser.add_argument("--labels", choices=("auto", "folders", "none"), default="auto", help="as data.labels")
    known = parser.parse_args(argv)
    for name, low, high in (("size", 1, None), ("quality", 1, 95), ("shard_mb", 1, None), ("workers", 0, None)):
        value = getattr(known, name)
        if value is not None and not low <= value <= (high or value):
            raise ConfigError(f"--{name} must be {f'from {low} to {high}' if high else f'at least {low}'}, got {value}")
    source, target = known.src.resolve(), known.dst.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ConfigError(f"DST must be neither in SRC nor around it, got {known.dst}")
    if not source.is_dir():
        raise ConfigError(f"SRC must be a folder, got {known.src}")
    from hjepa_engine.data.layout import read_layout  # torch is imported here: --help does without
    from hjepa_engine.data.packing import DAMAGED, pack
    from hjepa_engine.utils.bars import Bar

    layout = read_layout(source, known.train_dir, known.val_dir, known.labels)
    for note in layout.notes:
        print(note)
    options = {name: getattr(known, name) for name in ("size", "quality", "shard_mb", "train_dir", "val_dir", "labels")}
    total = len(layout.train.files) + (len(layout.val.files) if layout.val else 0)
    with Bar(lambda: "", total=total, unit=" images", disable=None) as bar:
        packed = pack(source, layout, target, options, known.workers, bar.update)
    damaged = f"; {packed.damaged:,} damaged ones are listed in {known.dst / DAMAGED}" if packed.damaged else ""
    print(f"packed {packed.images:,} images into {known.dst}{damaged}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
