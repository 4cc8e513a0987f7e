"""The errors of the disk formats: one root, each naming the file, the place, what was expected and the way out."""

from __future__ import annotations


class DiskError(Exception):
    """A disk image could not be opened, read or written.

    ``path`` is the file, ``offset`` the byte in it where the trouble stands (None where it has no place), ``hint``
    what a person can do about it. ``exit_code`` is the process exit code that the command line uses (1 failed,
    12 integrity), ``retryable`` whether the same call may succeed later.
    """

    exit_code = 1
    retryable = False

    def __init__(
        self, message: str, *, path: str | None = None, offset: int | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.offset = offset
        self.hint = hint

    def __str__(self) -> str:
        """Render as ``path: message (at offset N)``; the hint is shown apart by whoever reports the error."""
        where = f"{self.path}: " if self.path else ""
        at = f" (at offset {self.offset:#x})" if self.offset is not None else ""
        return f"{where}{self.message}{at}"


class FormatUnknownError(DiskError):
    """The file is none of the formats that are supported."""


class CorruptDiskError(DiskError):
    """A structure of the image contradicts its specification: checksum, bounds, overlap, signature."""

    exit_code = 12


class UnsupportedDiskError(DiskError):
    """The image is well formed but needs a feature that is not supported (unknown required metadata, say)."""


class ParentError(DiskError):
    """The parent of a differencing disk is missing, has changed, is outside the allowed folders, or loops."""


class OutOfRangeError(DiskError):
    """A request reaches outside the virtual disk."""

    exit_code = 2


class ReadOnlyError(DiskError):
    """A write was asked of a disk that was opened for reading."""


class DiskBusyError(DiskError):
    """Another process has the image open for writing."""

    retryable = True


class ToolError(DiskError):
    """An outside program (qemu-img) is missing or failed."""


class OsError(DiskError):
    """The operating system refused: no space, no permission, no such file, an I/O error."""
