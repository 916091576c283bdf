"""Write a report on a run, one HTML file that needs no network: is it collapsing, curves, pictures, checkpoints.

    python recipes/report.py --run RUN_DIR [--compare OTHER_RUN_DIR ...] [--output FILE]
    python recipes/report.py --run RUN_DIR --serve [--port 8000]

The run may be going on; --serve shows it in a browser of this machine, every ten seconds as it is then. A run that ends
writes its report by itself (logging.report); docs/report.md says what is in it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from hjepa_engine.config.paths import path_argument
from hjepa_engine.errors import ConfigError
from hjepa_engine.report import write_report
from hjepa_engine.report.serving import make_server
from hjepa_engine.run.cli import command_parser, run_command


def serve(run: Path, others: Sequence[Path], port: int) -> None:
    """Serve the report until Ctrl-C."""
    with make_server(run, others, port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_address[1]} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


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
    parser.add_argument("--serve", action="store_true", help="show it on a page that follows the run; Ctrl-C ends that")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="of the page; 0: any that is free (8000)")
    known = parser.parse_args(argv)
    if known.serve:
        if known.output:
            raise ConfigError("--output is for a file: --serve writes none")
        serve(known.run, known.compare, known.port)
        return
    try:
        print(write_report(known.run, known.output, known.compare))
    except OSError as error:
        raise ConfigError(f"--output {known.output or known.run} cannot be written to: {error.strerror}") from error


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
