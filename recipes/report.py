"""Write a report on a run, one HTML file that needs no network: is it collapsing, curves, pictures, checkpoints.

    python recipes/report.py --run RUN_DIR [--compare OTHER_RUN_DIR ...] [--output FILE]

The run may be going on. A run that ends writes its report by itself (logging.report); docs/report.md says what is in it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hjepa_engine.config.paths import path_argument
from hjepa_engine.errors import ConfigError
from hjepa_engine.report import write_report
from hjepa_engine.run.cli import command_parser, run_command


def main(argv: Sequence[str]) -> None:
    """Write the report, and say where it is."""
    parser = command_parser(__doc__ or "", with_config=False)
    parser.add_argument("--run", type=path_argument, required=True, metavar="RUN_DIR", help="the run folder")
    parser.add_argument(
        "--compare",
        type=path_argument,
        nargs="+",
        default=[],
        metavar="RUN_DIR",
        help="other runs, to be drawn into the same charts",
    )
    parser.add_argument(
        "--output", type=path_argument, metavar="FILE", help="the file (default: report.html in the run folder)"
    )
    known = parser.parse_args(argv)
    try:
        print(write_report(known.run, known.output, known.compare))
    except OSError as error:
        raise ConfigError(f"--output {known.output or known.run} cannot be written to: {error.strerror}") from error


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
