"""Evaluate the frozen encoder of a run with a linear probe, and compare with a random encoder and raw pixels.

    python recipes/linear_probe.py --run RUN_DIR [--checkpoint best] [--probe.features concat ...]

Of the configuration, data.* (other images: --data.dataset, --data.data_path, --data.image_size), probe.*, device, seed and
logging.progress_bar can be given; architecture, channels and normalization are those of the run.

The probe uses the same engine and handlers as pretraining. Features are computed once, from images without augmentation, and
standardized (like MAE's batch norm without affine parameters, arXiv:2111.06377).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hjepa_engine.config.paths import path_argument
from hjepa_engine.run.cli import command_parser, run_command


def main(argv: Sequence[str]) -> None:
    """Probe the encoder of a run."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("--run", type=path_argument, required=True, metavar="RUN_DIR", help="the run folder")
    parser.add_argument("--checkpoint", metavar="NAME", help="best, latest or a name; the exported encoder by default")
    known, overrides = parser.parse_known_args(argv)
    # torch is imported here: --help does without
    from hjepa_engine.recipes.common.probe import describe
    from hjepa_engine.recipes.common.probe_run import probe_run

    found = probe_run(known.run, known.checkpoint, overrides)
    print(describe(found.results, found.config))
    print(f"data: {found.data}")
    if found.note:
        print(f"note: {found.note}")
    print(f"results: {found.path}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
