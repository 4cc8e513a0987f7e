"""The one place where an exception becomes a sentence on stderr, a hint and an exit code."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import click

from cli.output import DeclinedError, Output, escape
from conversion.errors import ConversionError
from replica.errors import GodwitError
from vhdx.errors import DiskError

# The exit codes are a contract with scripts. Errors carry theirs; these are the ones that the command line decides.
OK = 0
FAILED = 1
USAGE = 2
DEGRADED = 3
NO_STORE = 10
LEASE_HELD = 11
INTEGRITY = 12
CONFIGURATION = 13
CONVERSION_REFUSED = 14
INTERRUPTED = 130

DEBUG_VARIABLE = "GODWIT_DEBUG"


_PLAIN: tuple[tuple[tuple[type[BaseException], ...], str, str, str | None, int], ...] = (
    ((DeclinedError,), "Declined", "not confirmed: nothing was changed", None, FAILED),
    ((KeyboardInterrupt, click.Abort), "Interrupted", "interrupted", None, INTERRUPTED),
    ((MemoryError,), "MemoryError", "out of memory", "Close other programs, or use a larger machine.", FAILED),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception as it is told: ``details`` are the further members of the JSON form."""

    type: str
    message: str
    hint: str | None
    exit_code: int
    details: dict[str, object]

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "error": {
                "type": self.type,
                "message": self.message,
                "hint": self.hint,
                "exit_code": self.exit_code,
                **self.details,
            }
        }


def describe(error: BaseException) -> Failure:
    """Say what an exception means to the person who ran the command."""
    if isinstance(error, (DiskError, GodwitError, ConversionError)):
        names = ("path", "offset", "key", "subject", "retryable")
        details = {name: getattr(error, name) for name in names if getattr(error, name, None) is not None}
        return Failure(type(error).__name__, str(error), error.hint, error.exit_code, details)
    if isinstance(error, click.ClickException):
        hint = _help_pointer(error) if isinstance(error, click.UsageError) else None
        return Failure("UsageError", error.format_message(), hint, USAGE, {})
    for kinds, name, message, hint, exit_code in _PLAIN:
        if isinstance(error, kinds):
            return Failure(name, message, hint, exit_code, {})
    hint = (
        f"This is a defect of godwit. Run the command again with {DEBUG_VARIABLE}=1 for the details, and report them."
    )
    return Failure("UnexpectedError", f"unexpected {type(error).__name__}: {error}", hint, FAILED, {})


def _help_pointer(error: click.UsageError) -> str | None:
    if error.ctx is None:
        return None
    return f"See '{error.ctx.command_path} --help'."


def report(error: BaseException, output: Output) -> int:
    """Tell the failure on stderr, with --json as a document on stdout too, and return the exit code."""
    if isinstance(error, BrokenPipeError):
        return quiet_pipe()
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        output.stderr.write(error.format_message() + "\n")
        return USAGE
    failure = describe(error)
    try:
        if os.environ.get(DEBUG_VARIABLE) and failure.exit_code not in (USAGE, INTERRUPTED):
            _write_traceback(error, output)
        if output.json and not output.answered:
            output.document(failure.document())
            output.stdout.flush()
        output.stderr.write(f"godwit: {escape(failure.message)}\n")
        if failure.hint:
            output.stderr.write(f"  hint: {escape(failure.hint)}\n")
        output.stderr.flush()
    except BrokenPipeError:
        quiet_pipe()
    return failure.exit_code


def _write_traceback(error: BaseException, output: Output) -> None:
    import traceback  # noqa: PLC0415 - only for whoever debugs

    output.stderr.write(escape("".join(traceback.format_exception(error)), keep_newlines=True))


def quiet_pipe() -> int:
    """Let stdout go where a reader that left cannot be missed, so that the interpreter's last flush is silent."""
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device, not a file
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    return FAILED
