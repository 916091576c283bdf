"""What recipes share on the command line: options, help, exit codes, the last line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import NoReturn

from hjepa_engine.config.loading import dump_config, load_config
from hjepa_engine.config.options import json_schema, list_options
from hjepa_engine.config.parsing import dump_yaml
from hjepa_engine.config.schema import Config
from hjepa_engine.errors import ConfigError, ForceQuit, Preempted, RunError, exit_code_of, one_line
from hjepa_engine.utils.process import before_exit, leave_at_once, make_streams_safe

EXIT_CODES = """\
exit codes:
  0 done   2 configuration   3 data   4 no usable checkpoint, or the last one could not be written
  5 stopped by a guard   75 interrupted and saved: run the same command again
  130 Ctrl-C outside of training, or twice   1 anything else"""


#: How this program was called, and how its help is to call the recipes; their files, where nobody says.
_CALLED: ContextVar[tuple[str | None, Mapping[str, str]]] = ContextVar("_CALLED", default=(None, {}))


@contextmanager
def called_as(program: str, programs: Mapping[str, str]) -> Iterator[None]:
    """Let parsers that are made meanwhile call themselves ``program``.

    Args:
        program: as usage lines show it.
        programs: what stands in help for ``python recipes/...``, by that.
    """
    token = _CALLED.set((program, programs))
    try:
        yield
    finally:
        _CALLED.reset(token)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def command_parser(description: str, with_config: bool = True) -> argparse.ArgumentParser:
    """A parser with ``--debug``.

    Args:
        description: for ``--help``.
        with_config: whether what the parser does not know is left for the configuration.
    """
    program, programs = _CALLED.get()
    for recipe, name in programs.items():
        description = description.replace(recipe, name)
    first, _, rest = description.partition("\n")
    parser = _Parser(
        prog=program,
        description=f"{first}\n{rest}".strip(),
        epilog=f"{_options_help()}\n\n{EXIT_CODES}" if with_config else EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [--KEY VALUE ...]" if with_config else None,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def read_config(
    description: str,
    default: Path,
    argv: Sequence[str],
    preview: Callable[[Config], None] | None = None,
    find_lr: Callable[[Config], None] | None = None,
) -> Config | None:
    """The configuration that a command line asks for; None where it only asked to see it.

    Args:
        description: for ``--help``.
        default: the file that is read without ``--config``.
        argv: the arguments.
        preview: what ``--preview`` does; None: there is no such option.
        find_lr: what ``--find_lr`` does.

    Raises:
        ConfigError: one line that says what is wrong.
    """
    parser = command_parser(description)
    shipped = {path.stem: path for path in sorted(default.parent.glob("*.yaml"))}
    names = f"{', '.join(shipped)}; default: {default.stem}"
    parser.add_argument(
        "--config",
        type=Path,
        default=default,
        metavar="FILE",
        help=f"YAML file, or the name of a shipped one ({names})",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--print_schema", action="store_true", help="print a JSON schema of the YAML file and exit")
    if preview is not None:
        parser.add_argument("--preview", action="store_true", help="print and draw schedules and masks, and exit")
    if find_lr is not None:
        parser.add_argument("--find_lr", action="store_true", help="try learning rates, suggest one, and exit")
    known, overrides = parser.parse_known_args(argv)
    if known.print_schema:
        print(json.dumps(json_schema(), indent=2))
        return None
    try:
        is_file = known.config.is_file()
    except OSError as error:  # a name that is too long
        raise ConfigError(f"--config {known.config}: {error.strerror}") from error
    file = known.config if is_file else shipped.get(str(known.config), known.config)
    config = load_config(file, overrides)
    if known.print_config:
        print(dump_config(config), end="")
        return None
    if preview is not None and known.preview:
        preview(config)
        return None
    if find_lr is not None and known.find_lr:
        find_lr(config)
        return None
    return config


def run_command(body: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a recipe's ``main``: an error ends it with its exit code and one sentence on the last line of standard error.

    One of several processes leaves without Python's own ending: see :func:`~hjepa_engine.utils.process.leave_at_once`.
    """
    argv = sys.argv[1:] if argv is None else argv
    make_streams_safe()
    for name in (signal.SIGTERM, signal.SIGUSR1):  # until a run's own handler takes them over
        signal.signal(name, _stop)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it reports every exception that we are about to report
    try:
        body(argv)
        before_exit(_exit_undisturbed)
    except (Exception, KeyboardInterrupt) as error:
        before_exit(_exit_undisturbed)
        if bars := sys.modules.get("hjepa_engine.utils.bars"):  # else there are none
            bars.close_bars()  # the last line is the reason, and nothing but it
        if "--debug" in argv:
            traceback.print_exc()
        print(one_line(error), file=sys.stderr, flush=True)
        if isinstance(error, ForceQuit):
            os._exit(exit_code_of(error))  # an ordinary exit would wait for the checkpoint that is being written
        _leave(exit_code_of(error))
    _leave(0)


def _leave(code: int) -> NoReturn:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave_at_once(code)
    sys.exit(code)


def _exit_undisturbed() -> None:
    """All is settled and said: signals change neither the exit code nor the last line; Ctrl-C may cut the rest short."""
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    if isinstance(sys.exc_info()[1], (RunError, RuntimeError, KeyboardInterrupt)):
        return  # the command is ending already; whoever sends signals tends to send several
    raise Preempted(f"{signal.Signals(number).name} outside of training: run the same command again to go on")


def _options_help() -> str:
    lines = ["configuration keys, in the YAML file or as --KEY VALUE:"]
    for option in list_options():
        bounds = f", {option.bounds}" if option.bounds else ""
        text = f"{option.description} [{option.type}{bounds}; default {dump_yaml(option.default, flow=True)}]".replace(
            "``", ""
        )
        lines += [f"  --{option.key}", textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)
