"""List the checkpoints of a run: step, epoch, metrics, size, why each was saved and why it is kept.

    python recipes/checkpoints.py --run RUN_DIR [--verify]

Tensors are not read, unless --verify asks for their checksums; the run may be going on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hjepa_engine.build import build_policy
from hjepa_engine.checkpoint.folder import checkpoint_folders, list_checkpoints
from hjepa_engine.checkpoint.retention import RetentionPolicy
from hjepa_engine.checkpoint.serialization import file_digest
from hjepa_engine.checkpoint.storage import STATE, Checkpoint
from hjepa_engine.config.loading import config_from
from hjepa_engine.config.paths import path_argument
from hjepa_engine.errors import CheckpointError, ConfigError
from hjepa_engine.report.sections import checkpoint_table
from hjepa_engine.run.cli import command_parser, run_command


def listing(checkpoints: Sequence[Checkpoint], policy: RetentionPolicy) -> list[str]:
    """The lines of the listing, newest checkpoint first."""
    found = checkpoint_table(checkpoints, policy([checkpoint.record for checkpoint in checkpoints]))
    lines = [found.headings, *found.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def policy_of(checkpoint: Checkpoint) -> RetentionPolicy:
    """The policy that the checkpoint's run was under; the default one where its configuration is of another version."""
    try:
        return build_policy(config_from(checkpoint.config))
    except ConfigError:
        return RetentionPolicy()


def main(argv: Sequence[str]) -> None:
    """List, and verify if asked to."""
    parser = command_parser(__doc__ or "", with_config=False)
    parser.add_argument(
        "--run", type=path_argument, required=True, metavar="RUN_DIR", help="a run folder or a folder of checkpoints"
    )
    parser.add_argument("--verify", action="store_true", help="read every checkpoint and compare its checksum")
    known = parser.parse_args(argv)
    problems: list[str] = []
    found: list[Checkpoint] = []
    for folder in checkpoint_folders(known.run):
        found = found or list_checkpoints(folder, lambda path, error: problems.append(f"{path.name}: {error}"))
    if not found and not problems:
        raise CheckpointError(f"{known.run} holds no checkpoint")
    if found:
        print("\n".join(listing(found, policy_of(found[0]))))
    if known.verify:
        found = [each for each in found if each.path.exists()]  # a run that is going on may have removed one
        bad = [each for each in found if file_digest(each.path / STATE) != each.digest]
        problems += [f"{checkpoint.record.name}: {STATE} does not match its sha256" for checkpoint in bad]
        print(f"verified: {len(found) - len(bad)} of {len(found)} checkpoints match their checksums")
    if problems:
        raise CheckpointError(f"damaged: {'; '.join(problems)}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
