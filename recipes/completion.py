"""Print a script that completes the commands and options of ``hjepa`` in bash or zsh.

    hjepa completion bash > ~/.local/share/bash-completion/completions/hjepa
    hjepa completion zsh > ~/.hjepa-completion && echo 'source ~/.hjepa-completion' >> ~/.zshrc

It has the options of this version: make it again after an update.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence

from hjepa_engine.recipes import command
from hjepa_engine.run.cli import command_parser, run_command

_SCRIPT = """\
_hjepa() {{
    local words="{commands}"
    if (( COMP_CWORD > 1 )); then
        case "${{COMP_WORDS[1]}}" in
{cases}
            *) words="" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o bashdefault -o default -F _hjepa hjepa
"""
#: zsh runs bash's completions once these are loaded.
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str) -> str:
    """The script for a shell, ``bash`` or ``zsh``."""
    cases = "\n".join(f'            {name}) words="{" ".join(options_of(name))}" ;;' for name in command.COMMANDS)
    text = _SCRIPT.format(commands=" ".join(command.COMMANDS), cases=cases)
    return (_ZSH if shell == "zsh" else "") + text


def options_of(name: str) -> list[str]:
    """The words that may follow a command, as its help names them."""
    if name == "completion":
        return ["bash", "zsh"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        command.body_of(name)(["--help"])
    return list(dict.fromkeys(re.findall(r"^ +(?:-h, )?(--[\w.]+)", printed.getvalue(), re.MULTILINE)))


def main(argv: Sequence[str]) -> None:
    """Print the script."""
    parser = command_parser(__doc__ or "", with_config=False)
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(script(parser.parse_args(argv).shell), end="")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
