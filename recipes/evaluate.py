"""Evaluate the frozen encoder of a run by the standard set of tasks, against a random encoder and raw pixels.

    python recipes/evaluate.py --run RUN_DIR [--checkpoint best] [--tasks linear knn ...] [--seeds 3]
        [--transfer data.dataset=cifar10 data.data_path=DIR ...] [--KEY VALUE ...]

Writes RUN_DIR/evaluation.md and evaluation.json, and prints the table. Learning rates and weight decays are chosen on a
part of the training labels; test images are judged once. Results of other tasks stay in the files, those of other
settings get files of their own. docs/evaluation.md has the protocol of each figure.

Of the configuration, the keys that linear_probe.py takes can be given: data.*, probe.* (epochs, batch_size,
features_in_memory_gb), device, seed and logging.progress_bar.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hjepa_engine.config.paths import path_argument
from hjepa_engine.run import cli


def main(argv: Sequence[str]) -> None:
    """Evaluate the encoder of a run."""
    parser = cli.command_parser(__doc__ or "")
    parser.add_argument("--run", type=path_argument, required=True, metavar="RUN_DIR", help="the run folder")
    parser.add_argument("--checkpoint", metavar="NAME", help="best, latest or a name; the exported encoder by default")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="some of linear, knn, attentive, few_label, dense, transfer; by default all that can be done",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions (3)")
    parser.add_argument(
        "--transfer",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="data.* of the second data set; adds the task transfer",
    )
    known, overrides = parser.parse_known_args(argv)
    # torch is imported here: --help does without
    from hjepa_engine.recipes.evaluation.evaluation import evaluate_run

    found = evaluate_run(known.run, known.checkpoint, known.tasks, overrides, known.transfer, known.seeds)
    print(found.table)
    print(f"results: {found.path.with_suffix('.md')}, {found.path.name}; {found.record['seconds']:.0f} s")


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
