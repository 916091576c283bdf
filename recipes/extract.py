"""Save patch tokens or mean tokens of images, by layer and level, in shards.

    python recipes/extract.py --run RUN_DIR --output DIR [--checkpoint best] [--data FOLDER] [--features patches]
    python recipes/extract.py --encoder RUN_DIR/encoder --data FOLDER --output DIR [--layers 2 4] [--format npy]

Each split has a folder of shards, each of which has features and index.jsonl: index, name (the path) and label of each
row. A shard is whole or absent: the same command goes on where it was stopped, and ends with the same bytes. Images that
cannot be read are left out. Of the configuration, data.*, device, seed and logging.progress_bar can be given. --encoder
takes an encoder of another project, or an export, as that of linear_probe.py: docs/interop.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hjepa_engine import errors
from hjepa_engine.config.overrides import overridden_keys
from hjepa_engine.config.paths import path_argument
from hjepa_engine.run.cli import command_parser, run_command


def main(argv: Sequence[str]) -> None:
    """Extract features."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("--run", type=path_argument, metavar="RUN_DIR", help="the run folder")
    parser.add_argument("--checkpoint", metavar="NAME", help="best, latest or a name; the exported encoder by default")
    parser.add_argument(
        "--encoder", type=path_argument, metavar="DIR", help="an encoder that is no run's, or timm/NAME"
    )
    parser.add_argument(
        "--data", type=path_argument, metavar="FOLDER", help="an image folder; by default the run's images, with --run"
    )
    parser.add_argument("--output", type=path_argument, required=True, metavar="DIR", help="a new folder, or one begun")
    parser.add_argument("--format", choices=("safetensors", "npy"), default="safetensors", help="of shards")
    parser.add_argument("--features", choices=("mean", "patches"), default="mean", help="of each image (mean)")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[], metavar="N", help="blocks, from 1, besides the last"
    )
    parser.add_argument("--levels", action="store_true", help="every level of the run's hierarchy too")
    parser.add_argument("--splits", nargs="+", choices=("train", "probe", "val"), default=["train", "val"])
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of what is saved (float32)")
    parser.add_argument("--shard_images", type=int, default=1024, metavar="N", help="images of a shard (1024)")
    known, overrides = parser.parse_known_args(argv)
    if (known.run is None) == (known.encoder is None):
        raise errors.ConfigError("one of --run and --encoder must be given")
    if known.encoder is not None and (known.levels or known.checkpoint):
        raise errors.ConfigError("--levels and --checkpoint need --run: an exported encoder knows neither")
    if known.shard_images < 1:
        raise errors.ConfigError(f"--shard_images must be at least 1, got {known.shard_images}")
    if known.data is not None:
        overrides = [*overrides, "--data.dataset=imagefolder", f"--data.data_path={known.data}"]
    named = {"data.dataset", "data.class_path"} & set(overridden_keys(overrides))
    if known.encoder is not None and not named:
        raise errors.ConfigError("--encoder knows no images: give --data or --data.dataset")
    # torch is imported here: --help does without
    from hjepa_engine.recipes.common.extraction import Request, extract, open_encoder, open_export

    if known.run is not None:
        _, config, encoder, _ = open_encoder(known.run, known.checkpoint, overrides)
    else:
        config, encoder = open_export(str(known.encoder), overrides)
    request = Request(
        known.features,
        tuple(sorted(set(known.layers))),
        known.levels,
        known.format,
        known.dtype,
        known.shard_images,
        tuple(dict.fromkeys(known.splits)),
    )
    for split, written in extract(config, encoder, known.output, request).items():
        number = (
            f"{written} shard{'' if written == 1 else 's'} written into" if written else "complete, nothing to do in"
        )
        print(f"{split}: {number} {known.output / split}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
