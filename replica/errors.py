"""The errors of the engine: one root; each names the object, what was expected and the way out."""

from __future__ import annotations

from datetime import datetime


class GodwitError(Exception):
    """Something the engine was asked for could not be done.

    ``key`` is the object in the store or ``path`` the file that is concerned; ``hint`` what a person can do about it;
    ``exit_code`` the process exit code; ``retryable`` whether the same call may succeed later.
    """

    exit_code = 1
    retryable = False

    def __init__(
        self, message: str, *, key: str | None = None, path: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.key = key
        self.path = path
        self.hint = hint

    def __str__(self) -> str:
        """Render as ``subject: message``; the hint is shown apart by whoever reports the error."""
        subject = self.key or self.path
        return f"{subject}: {self.message}" if subject else self.message


class UsageError(GodwitError):
    """The request contradicts itself or names something that does not exist."""

    exit_code = 2


class ConfigurationError(GodwitError):
    """A configuration file, environment variable or store URL is wrong."""

    exit_code = 13


class StoreError(GodwitError):
    """The store failed to answer, or answered with an error."""


class StoreUnavailableError(StoreError):
    """The store could not be reached, or said to come back later."""

    exit_code = 10
    retryable = True


class StoreRefusedError(StoreError):
    """The store lacks something that safe replication needs, or denies access."""

    exit_code = 10


class NoStoreError(StoreError):
    """There is no Godwit store at the address, or none was given."""

    exit_code = 10


class StoreFullError(StoreError):
    """The store has no room left."""


class ObjectMissingError(StoreError):
    """An object that was asked for does not exist."""


class ObjectExistsError(StoreError):
    """A create-only write met an object that exists already."""


class ObjectChangedError(StoreError):
    """A compare-and-swap met another version than the one expected."""


class ObjectLockedError(StoreError):
    """An object cannot be deleted yet; ``until`` is when it can be, where that is known."""

    def __init__(self, message: str, *, key: str | None = None, until: datetime | None = None) -> None:
        super().__init__(message, key=key, hint="it can be deleted once its lock has ended")
        self.until = until


class IntegrityError(GodwitError):
    """Bytes read back are not the bytes that were written: checksum, size, magic, or a reference to nothing."""

    exit_code = 12


class TenantKeyError(GodwitError):
    """The tenant's key was not given, or what was given does not open it. Nothing was written."""

    exit_code = 13


class FormatVersionError(GodwitError):
    """An object was written by a later version than this one understands."""

    exit_code = 13


class LeaseHeldError(GodwitError):
    """Another agent holds the right to write to this VM."""

    exit_code = 11
    retryable = True


class LeaseLostError(GodwitError):
    """Another agent took over while this one was at work; nothing more was published."""

    exit_code = 11


class SourceError(GodwitError):
    """A protected disk could not be read."""


class PlatformError(GodwitError):
    """A recovery machine could not be made, started, asked or removed."""


class StandingError(GodwitError):
    """A command came in the wrong order: the hint names the one that would be right."""

    exit_code = 2
