"""A page blob as an upload sees it; ``replica.platforms.azure.storage`` is the one that speaks to Azure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from replica.errors import LeaseHeldError, LeaseLostError, PlatformError


@dataclass(frozen=True, slots=True)
class BlobState:
    """A blob as it is: its whole ``size`` in bytes, and what is noted with it."""

    name: str
    size: int
    metadata: Mapping[str, str]
    is_page_blob: bool = True


class BlobHeldError(LeaseHeldError):
    """Somebody else uploads to the blob, or did less than a minute ago."""


class BlobLostError(LeaseLostError):
    """Somebody else took the blob over, or deleted it, while it was uploaded to."""


class BlobUnreachableError(PlatformError):
    """The service did not answer, or said to come back later."""

    retryable = True


class PageBlob(Protocol):
    """A page blob. Everything raises PlatformError; what changes it under a lease also BlobLostError."""

    @property
    def url(self) -> str:
        """Its address, without credentials."""

    def look(self) -> BlobState | None:
        """Return what it is, None where there is none."""

    def create(self, size: int, metadata: Mapping[str, str]) -> bool:
        """Make it, of ``size`` bytes that are zero; False where there is one of the name."""

    def acquire(self, lease: str, seconds: int) -> None:
        """Let nobody else change it. Whoever has the lease of that id already has it anew. Raises BlobHeldError."""

    def renew(self, lease: str) -> None:
        """Hold it on."""

    def release(self, lease: str) -> None:
        """Let others change it."""

    def put(self, lease: str, offset: int, data: bytes) -> None:
        """Write whole pages, which the service compares with a hash that goes along."""

    def note(self, lease: str, metadata: Mapping[str, str]) -> None:
        """Replace what is noted with it."""

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the half-open ranges of pages that were written, in order, with something between any two."""

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of it."""

    def delete(self) -> None:
        """Remove it, whoever has a lease; nothing where it is gone."""
