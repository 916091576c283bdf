"""Evaluate the frozen encoder of a run with a linear probe, and compare with a random encoder and raw pixels.

    python recipes/linear_probe.py --run RUN_DIR [--checkpoint best] [--probe.features concat ...]
    python recipes/linear_probe.py --encoder PATH_OR_NAME [--output FOLDER] [--data.dataset cifar10 ...]

Of the configuration, data.* (other images: --data.dataset, --data.data_path, --data.image_size), probe.*, device, seed and
logging.progress_bar can be given; architecture, channels and normalization are those of the run. --encoder takes an encoder
of another project, or an export: docs/interop.md.

The probe uses the same engine and handlers as pretraining. Features are computed once, from images without augmentation, and
standardized (like MAE's batch norm without affine parameters, arXiv:2111.06377).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hjepa_engine.config.paths import path_argument
from hjepa_engine.run.cli import command_parser, run_command


def main(argv: Sequence[str]) -> None:
    """Probe the encoder of a run, or another one."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("--run", type=path_argument, metavar="RUN_DIR", help="the run folder")
    parser.add_argument("--checkpoint", metavar="NAME", help="best, latest or a name; the exported encoder by default")
    parser.add_argument(
        "--encoder", type=path_argument, metavar="PATH", help="an encoder that is no run's, or timm/NAME"
    )
    parser.add_argument("--output", type=path_argument, metavar="FOLDER", help="of the results, with --encoder")
    known, overrides = parser.parse_known_args(argv)
    if (known.run is None) == (known.encoder is None):
        parser.error("one of --run and --encoder must be given")
    if known.checkpoint is not None and known.run is None:
        parser.error("--checkpoint names one of a run: give --run, or the checkpoint's folder as --encoder")
    if known.output is not None and known.encoder is None:
        parser.error("--output is for --encoder: results of a run are in its folder")
    # torch is imported here: --help does without
    from hjepa_engine.recipes.common.probe import describe
    from hjepa_engine.recipes.common.probe_encoder import probe_encoder
    from hjepa_engine.recipes.common.probe_run import probe_run

    if known.encoder is not None:
        found = probe_encoder(str(known.encoder), overrides, known.output)
    else:
        found = probe_run(known.run, known.checkpoint, overrides)
    print(describe(found.results, found.config))
    print(f"data: {found.data}")
    for line in found.notes:
        print(f"encoder: {line}")
    if found.note:
        print(f"note: {found.note}")
    if found.path:
        print(f"results: {found.path}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
