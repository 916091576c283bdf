"""Errors that end a run with a one-line message and a documented exit code."""

from __future__ import annotations


class RunError(Exception):
    """A run cannot continue; the message is one line that says what is wrong, where, and what is allowed."""

    exit_code = 1


class ConfigError(RunError, ValueError):
    """The configuration is invalid: exit code 2, before anything is created."""

    exit_code = 2


class DataError(RunError):
    """Data is missing, empty or corrupt: exit code 3."""

    exit_code = 3


class ExportError(RunError):
    """A run folder has no usable exported encoder, or it cannot be written: exit code 4."""

    exit_code = 4


class CheckpointError(RunError):
    """A required checkpoint is missing or unusable, or the last one could not be written: exit code 4."""

    exit_code = 4


class Preempted(RunError):
    """The run was stopped from outside and saved; the same command resumes it: exit code 75."""

    exit_code = 75


class ForceQuit(KeyboardInterrupt):
    """A second Ctrl-C: exit at once, without saving: exit code 130."""


class GuardStop(RunError):
    """A guard stopped the run (collapse, non-finite loss): exit code 5."""

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
