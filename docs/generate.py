"""Write docs/configuration.md from the dataclasses: ``python docs/generate.py``; a test compares it."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from hjepa_engine.config import schema as config
from hjepa_engine.config.loading import Option, list_options

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """\
# Configuration

Every key, generated from the dataclasses in `hjepa_engine/config/schema.py` by `python docs/generate.py`.

A run is described by one YAML file, and every key can be given on the command line as well:

    python recipes/pretrain.py --config my_run.yaml --training.lr 3e-4 --masking.mask_scale '[0.1, 0.2]'
    python recipes/pretrain.py --config my_run.yaml --print_config      # the resolved configuration; reloadable

From Python: `load_config("my_run.yaml", ["--training.lr", "3e-4"])`, or the dataclasses themselves: `Config(seed=1)`.

YAML is read strictly: numbers as in YAML 1.2 (`1e-4` is one), a repeated key or an alias is an error, tags are refused.
A mistake is one line that names the key, the rule and the value, and exit code 2, before anything is created.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | an unexpected error; `--debug` shows its traceback |
| 2 | the configuration is wrong, or the run folder is in use or holds another run |
| 3 | data is missing, too little or damaged, or a loader process was killed |
| 4 | there is no usable checkpoint or exported encoder where one must be, or the last checkpoint could not be written |
| 5 | a guard has stopped the run (non-finite loss) |
| 75 | interrupted and saved: run the same command again ([Checkpoints](checkpoints.md)) |
| 130 | Ctrl-C outside of training, or twice |

A level (`model.levels`) has these keys: {levels}. A handler (`handlers`) has {handlers}.
"""


def page() -> str:
    """The whole page."""
    parts = [
        HEAD.format(levels=_inline(config.Level), handlers=_inline(config.HandlerConfig)),
    ]
    for section, options in groupby(list_options(), key=lambda option: option.key.rpartition(".")[0]):
        parts.append(f"\n## {section or 'top level'}\n\n| key | type | default | |\n| --- | --- | --- | --- |\n")
        parts += [_row(option) for option in options]
    return "".join(parts)


def _row(option: Option) -> str:
    kind = option.type + (f", {option.limits}" if option.limits else "")
    default = (
        "null" if option.default is None else str(option.default).replace("True", "true").replace("False", "false")
    )
    cells = [f"`{option.key}`", kind, f"`{default}`", option.description.replace("``", "`")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _inline(cls: type) -> str:
    described = (f"`{o.key}` ({o.description.rstrip('.').replace('``', '`')})" for o in list_options(cls))
    return ", ".join(described)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
