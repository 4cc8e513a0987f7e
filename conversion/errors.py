"""The errors of the converter: one root, each naming what it is about and the way out.

ConversionError
├── RefusedError           the disk cannot be converted, by a rule; nothing was changed
├── DamagedError           a table, file system, hive or manifest contradicts itself
├── UnsupportedError       it is well formed and needs something that is not supported
├── NoSpaceError           a file system or a gap has no room for what must be written
└── ToolError              an outside program is missing or failed
"""

from __future__ import annotations


class ConversionError(Exception):
    """A conversion could not be planned, applied or undone.

    ``subject`` names what it is about (a partition, a file, an object), ``hint`` says what a person can do.
    ``exit_code`` is the process exit code that the command line uses; ``retryable`` whether the same call may succeed
    later.
    """

    exit_code = 1
    retryable = False

    def __init__(self, message: str, *, subject: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.subject = subject
        self.hint = hint

    def __str__(self) -> str:
        """Render as ``subject: message``; the hint is shown apart by whoever reports the error."""
        return f"{self.subject}: {self.message}" if self.subject else self.message


class RefusedError(ConversionError):
    """The disk cannot be converted, or not back, by a rule that the message names. Nothing was changed."""

    exit_code = 14


class DamagedError(ConversionError):
    """What was read contradicts its specification: a checksum, a bound, a signature."""

    exit_code = 12


class UnsupportedError(ConversionError):
    """What was read is well formed but needs a feature that is not supported."""

    exit_code = 14


class NoSpaceError(ConversionError):
    """There is no room for what must be written."""

    exit_code = 14


class ToolError(ConversionError):
    """An outside program is not installed, or failed."""
