"""The command ``hjepa``: each recipe under one name. ``hjepa pretrain`` is ``python recipes/pretrain.py``.

hjepa COMMAND [options]
hjepa COMMAND --help
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from hjepa_engine import __version__
from hjepa_engine.errors import ConfigError
from hjepa_engine.run.cli import EXIT_CODES, called_as, run_command

#: The module of each command in ``hjepa_engine.recipes``, its first arguments, and what it does.
COMMANDS = {
    "pretrain": ("pretrain", (), "train an encoder on images without labels; the same command goes on with a run"),
    "preview": ("pretrain", ("--preview",), "print and draw schedules and masks before training"),
    "probe": ("linear_probe", (), "linear probe of a run's encoder, or of another one"),
    "evaluate": ("evaluate", (), "all tasks on a run's encoder: linear, kNN, few labels, attentive, dense"),
    "ablation": ("ablation", (), "train variants over seeds, and tabulate what each of them reaches"),
    "extract": ("extract", (), "save features of images"),
    "export": ("export", (), "write an encoder for timm, transformers, ONNX Runtime or torch.export"),
    "report": ("report", (), "write report.html: is it healthy, curves, pictures, probes"),
    "checkpoints": ("checkpoints", (), "list a run's checkpoints, and why each is kept"),
    "pack": ("pack", (), "pack an image folder into a few memory-mapped files"),
    "doctor": ("doctor", (), "what a bug report needs, and whether training works here"),
    "completion": ("completion", (), "a script that completes commands and options in bash or zsh"),
}


def main(argv: Sequence[str]) -> None:
    """Do what the command line says.

    Raises:
        ConfigError: there is no such command.
    """
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(__version__)
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}{hint}")
    else:
        with called_as(f"hjepa {name}", PROGRAMS):
            body_of(name)([*COMMANDS[name][1], *rest])


def help_text() -> str:
    """What ``hjepa --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, _, what) in COMMANDS.items()]
    usage = "usage: hjepa COMMAND [options]     hjepa COMMAND --help     hjepa --version"
    return "\n".join([usage, "", "commands:", *lines, "", EXIT_CODES])


def body_of(name: str) -> Callable[[Sequence[str]], None]:
    """The ``main`` of a command's recipe."""
    body: Callable[[Sequence[str]], None] = import_module(f"hjepa_engine.recipes.{COMMANDS[name][0]}").main
    return body


#: The commands by how the recipes' own help calls them.
PROGRAMS = {
    f"python recipes/{module}.py": f"hjepa {name}" for name, (module, first, _) in COMMANDS.items() if not first
}


def run() -> None:
    """The console script."""
    run_command(main, sys.argv[1:])


if __name__ == "__main__":
    run()
