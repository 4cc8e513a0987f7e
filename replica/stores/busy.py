"""The error of a store that says when to come back."""

from __future__ import annotations

from replica.errors import StoreUnavailableError


class StoreBusyError(StoreUnavailableError):
    """The store asked for fewer requests, or for some time; ``retry_after_seconds`` is what it named, if it did."""

    def __init__(
        self, message: str, *, key: str | None = None, hint: str | None = None, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message, key=key, hint=hint)
        self.retry_after_seconds = retry_after_seconds
