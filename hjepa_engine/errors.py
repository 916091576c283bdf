"""Errors that end a run with one line and a documented exit code."""

from __future__ import annotations


class RunError(Exception):
    """A run cannot go on; the message is one line that says what, where and what is allowed."""

    exit_code = 1


class ConfigError(RunError, ValueError):
    """The configuration is wrong: exit code 2, before anything is created."""

    exit_code = 2


class DataError(RunError):
    """The data is missing, empty or damaged: exit code 3."""

    exit_code = 3


class ExportError(RunError):
    """A run folder holds no usable weights: exit code 4."""

    exit_code = 4


class CheckpointError(RunError):
    """There is no usable checkpoint where one must be, or the last one could not be written: exit code 4."""

    exit_code = 4


class Preempted(RunError):
    """The run was asked to stop; the same command continues it: exit code 75."""

    exit_code = 75


class ForceQuit(KeyboardInterrupt):
    """Ctrl-C for the second time: leave without waiting for anything, exit code 130."""


class GuardStop(RunError):
    """A guard has ended the run (collapse, non-finite loss): exit code 5."""

    exit_code = 5


class Rollback(GuardStop):
    """A guard asks to go back to a checkpoint from before it saw something wrong; where nobody does, it ends the run.

    Args:
        message: what was seen.
        before: iteration from which on something may be wrong.
    """

    def __init__(self, message: str, before: int) -> None:
        super().__init__(message)
        self.before = before
