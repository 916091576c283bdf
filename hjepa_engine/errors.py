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


class PeerEnded(RunError):
    """Another process of the run has ended, and so must this one: with its exit code, or 75 if it left without a word.

    Args:
        message: which one, and why.
        exit_code: its exit code.
    """

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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


def exit_code_of(error: BaseException) -> int:
    """The documented exit code of an error."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, RunError) else 1


def one_line(error: BaseException) -> str:
    """An error in one sentence; a loader's worker wraps it into a traceback of its own, whose last line it is."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, RunError):
        return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    line = lines[-1] if lines[0].startswith("Caught ") else lines[0]
    return f"unexpected {type(error).__name__}: {line} (--debug shows where)"
