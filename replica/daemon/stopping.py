"""Stopping in good order: the word that work is to be given up, and a store that passes it on to its users."""

from __future__ import annotations

import threading
from enum import Enum

from replica import lease
from replica.daemon.around import AroundStore
from replica.errors import FormatVersionError, GodwitError, IntegrityError
from replica.stores.store import ObjectData, Store


class AbandonedError(GodwitError):
    """The agent was told to stop, and what was under way was given up before it published anything."""

    retryable = True


class Stopper:
    """Says whether work is to be given up; waits that it would otherwise sit through end with the word."""

    def __init__(self) -> None:
        self._abandoned = threading.Event()

    @property
    def abandoned(self) -> bool:
        """Whether the word was given."""
        return self._abandoned.is_set()

    def abandon(self) -> None:
        """Give the word, for good."""
        self._abandoned.set()

    def check(self) -> None:
        """Raise AbandonedError if the word was given."""
        if self._abandoned.is_set():
            raise AbandonedError("given up, since the agent stops", hint="the next cycle uses what was stored")

    def sleep(self, seconds: float) -> None:
        """Wait so long. Raises AbandonedError at once if the word is given."""
        self._abandoned.wait(seconds)
        self.check()

    def progress(self, done_bytes: int, total_bytes: int, phase: str) -> None:
        """Take note of progress, as whoever works reports it."""
        self.check()


class Where(Enum):
    """Where work can be given up."""

    ANYWHERE = "anywhere"  # cut off at any request it leaves nothing that the next run does not handle
    BETWEEN_BATCHES = "between batches"  # where it looks whether its lease is still held


class StoppableStore(AroundStore):
    """A store that raises AbandonedError once the word was given, but lets a lease be given back."""

    def __init__(self, inner: Store, stopper: Stopper, where: Where = Where.ANYWHERE) -> None:
        super().__init__(inner)
        self._stopper = stopper
        self._where = where

    def before(self, kind: str, key: str, data: ObjectData = b"") -> None:
        """Refuse the call if work is to be given up."""
        if not self._stopper.abandoned:
            return
        if kind == "replace":
            if _is_release(key, data):
                return
        elif self._where is Where.BETWEEN_BATCHES:
            return
        self._stopper.check()


def _is_release(key: str, data: ObjectData) -> bool:
    try:
        return not lease.decode(bytes(data), key=key).held
    except (IntegrityError, FormatVersionError):
        return False
