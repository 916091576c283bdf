"""Pretrain an H-JEPA on images without labels, then measure its target encoder with a linear probe.

    python recipes/pretrain.py                # pages of digits, a minute or two; again: goes on where it was stopped
    python recipes/pretrain.py --config recipes/configs/cifar10.yaml --data.data_path data/cifar10
    torchrun --nproc_per_node 2 recipes/pretrain.py --config ...         # several GPUs

I-JEPA (arXiv:2301.08243) with a hierarchy of levels; docs/architecture.md has the timeline that handlers attach to, and
docs/steps.md how to train a model and a step of your own. The parts of a run are in recipes/common/build.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hjepa_engine.run.cli import read_config, run_command

if TYPE_CHECKING:
    from hjepa_engine.config import Config
    from hjepa_engine.recipes.common.build import Modules
    from hjepa_engine.recipes.common.run import Datasets, Run
    from hjepa_engine.types import Handler, Step

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digit_pages.yaml"


def build(
    config: Config,
    *,
    step: Step | None = None,
    modules: Modules | None = None,
    handlers: Sequence[Handler] = (),
    data: Datasets | None = None,
) -> Run:
    """Build every part of a run and attach every handler; writes nothing yet.

    Args:
        config: of the run.
        step: what an iteration computes; by default what ``step`` in the configuration names, or H-JEPA's.
        modules: what the step works on, or a function that makes it from the configuration (its random initial weights
            then follow ``seed``); by default what ``model.class_path`` names, or H-JEPA's.
        handlers: of your own, attached after the others.
        data: map-style data sets, (train, val), in place of the one that the configuration names; an item is
            (image, label), a dict with ``image`` and perhaps ``label``, or an image: a PIL image, an array or a tensor.

    Returns:
        The run: ``run.fit()`` trains it, ``run.trainer`` takes further handlers.
    """
    from hjepa_engine.recipes.common.build import build_run  # torch is imported here: --help does without

    return build_run(config, step=step, modules=modules, handlers=handlers, data=data)


def main(argv: Sequence[str], default: Path = DEFAULT_CONFIG, **parts: Any) -> None:
    """Pretrain as the command line says.

    Args:
        argv: the arguments.
        default: the configuration that is read without ``--config``.
        **parts: ``step``, ``modules``, ``handlers`` and ``data`` for :func:`build`.
    """
    build_parts = partial(build, **parts)

    def show(config: Config) -> None:
        from hjepa_engine.recipes.common.preview import preview

        preview(config, build_parts)

    def search(config: Config) -> None:
        from hjepa_engine.recipes.common.lr_finder import find_lr

        find_lr(config, build_parts)

    config = read_config(__doc__ or "", default, argv, show, search)
    if config is None:
        return
    from hjepa_engine.recipes.common.run import run_to_end

    run_to_end(config, build_parts, parts.get("data"))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
