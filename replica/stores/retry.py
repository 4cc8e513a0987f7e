"""Patience with a store: bounded retries, and a look at what became of a write whose answer was lost.

A write that ends in StoreUnavailableError may have been applied. It is read back and compared before it is sent again,
and where a repeated write is refused because the object exists or has changed, what is there is compared too: equal
bytes mean that the first attempt had succeeded. Two writers that send the same bytes can therefore both be told that
they won; bytes that decide a race must differ from writer to writer, and from one writing to the next.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import tenacity

from replica.errors import ObjectChangedError, ObjectExistsError, ObjectMissingError, StoreUnavailableError
from replica.stores.busy import StoreBusyError
from replica.stores.store import ObjectData, ObjectInfo, Store

logger = logging.getLogger(__name__)

T = TypeVar("T")

LIST_BATCH = 1000  # objects that are listed within one bound of attempts


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long a call is repeated."""

    attempts: int = 8
    limit_seconds: float = 120.0  # no further attempt begins after that
    first_pause_seconds: float = 0.25  # doubles with each attempt
    longest_pause_seconds: float = 20.0

    def pause_seconds(self, attempt: int, chance: float) -> float:
        """Return the pause after the ``attempt``-th failure (from 1), half of it left to ``chance`` in [0, 1)."""
        whole = min(self.longest_pause_seconds, self.first_pause_seconds * 2.0 ** min(attempt - 1, 30))
        return whole * (0.5 + chance / 2)


class ResilientStore:
    """Any store, with its calls repeated while it is unavailable. Raises what the store raises in the end.

    A pause is at least what the store asked for (Retry-After). Ranges that come back shorter than asked are compared
    with the object's size; that whole objects are whole is for the store itself to check, which knows what was
    promised. ``sleep``, ``clock`` (seconds, monotonic) and ``chance`` (as random.random) can be replaced.
    """

    def __init__(
        self,
        inner: Store,
        patience: Patience | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._inner = inner
        self._patience = patience or Patience()
        self._sleep = sleep
        self._clock = clock
        self._chance = chance

    @property
    def inner(self) -> Store:
        """The store that does the work."""
        return self._inner

    @property
    def url(self) -> str:
        """The inner store's address."""
        return self._inner.url

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes or a range of them; see ``Store.get``."""

        def attempt() -> bytes:
            data = self._inner.get(key, start=start, length=length)
            wanted = length if length is not None else -start if start < 0 else 0
            if len(data) < wanted:
                self._check_end(key, start, length, data)
            return data

        return self._repeat(attempt)

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the whole object and its tag; see ``Store.get_tagged``."""
        return self._repeat(lambda: self._inner.get_tagged(key))

    def head(self, key: str) -> ObjectInfo:
        """Return size and tag; see ``Store.head``."""
        return self._repeat(lambda: self._inner.head(key))

    def create(self, key: str, data: ObjectData) -> str:
        """Write the object if none exists; see ``Store.create``."""
        in_doubt = False

        def attempt() -> str:
            nonlocal in_doubt
            if in_doubt and (found := self._read_back(key)) is not None:
                return _settled(found, data, ObjectExistsError("the object exists already", key=key))
            try:
                return self._inner.create(key, data)
            except StoreUnavailableError:
                in_doubt = True
                raise
            except ObjectExistsError as refusal:
                # The lost attempt may have been applied after it was looked for.
                if not in_doubt or (found := self._read_back(key)) is None:
                    raise
                return _settled(found, data, refusal)

        return self._repeat(attempt)

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        """Write the object if its tag still is ``tag``; see ``Store.replace``."""
        in_doubt = False

        def attempt() -> str:
            nonlocal in_doubt
            if in_doubt:
                found = self._inner.get_tagged(key)
                if found[1] != tag:
                    return _settled(found, data, ObjectChangedError("the object was changed by another", key=key))
            try:
                return self._inner.replace(key, data, tag=tag)
            except StoreUnavailableError:
                in_doubt = True
                raise
            except ObjectChangedError as refusal:
                if not in_doubt or (found_now := self._read_back(key)) is None:
                    raise
                return _settled(found_now, data, refusal)

        return self._repeat(attempt)

    def delete(self, key: str) -> None:
        """Remove the object if it is there; see ``Store.delete``."""
        self._repeat(lambda: self._inner.delete(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects in key order, going on after the last one seen where a listing breaks; ``Store.list``."""
        last = start_after
        listing: Iterator[ObjectInfo] | None = None

        def batch() -> tuple[ObjectInfo, ...]:
            nonlocal listing
            try:
                if listing is None:
                    listing = self._inner.list(prefix, start_after=last)
                return tuple(islice(listing, LIST_BATCH))
            except StoreUnavailableError:
                listing = None  # a generator that raised is finished
                raise

        while found := self._repeat(batch):
            yield from found
            last = found[-1].key

    def close(self) -> None:
        """Close the inner store."""
        self._inner.close()

    def repeat(self, attempt: Callable[[], T]) -> T:
        """Do ``attempt``, which may be done more than once, until it succeeds or patience ends."""
        return self._repeat(attempt)

    def _repeat(self, attempt: Callable[[], T]) -> T:
        begun = self._clock()

        def stop(state: tenacity.RetryCallState) -> bool:
            spent = self._clock() - begun + state.upcoming_sleep
            return state.attempt_number >= self._patience.attempts or spent > self._patience.limit_seconds

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(StoreUnavailableError),
            wait=self._wait,
            stop=stop,
            sleep=self._sleep,
            before_sleep=_report,
            reraise=True,
        )
        return retrying(attempt)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        pause_seconds = self._patience.pause_seconds(state.attempt_number, self._chance())
        error = _error(state)
        asked = error.retry_after_seconds if isinstance(error, StoreBusyError) else None
        return max(pause_seconds, asked or 0.0)

    def _read_back(self, key: str) -> tuple[bytes, str] | None:
        try:
            return self._inner.get_tagged(key)
        except ObjectMissingError:
            return None

    def _check_end(self, key: str, start: int, length: int | None, data: bytes) -> None:
        """Raise StoreUnavailableError if the object had more to give than ``data``."""
        size = self._inner.head(key).size
        begin = max(0, size + start) if start < 0 else min(start, size)
        there = size - begin if length is None else min(length, size - begin)
        if len(data) < there:
            raise StoreUnavailableError(f"{len(data)} bytes arrived of {there}", key=key)


def _settled(found: tuple[bytes, str], data: ObjectData, refusal: Exception) -> str:
    """Return the tag of what was read back if it is ``data``; raise ``refusal`` if it is not."""
    content, tag = found
    if content != memoryview(data).cast("B"):
        raise refusal
    return tag


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _report(state: tenacity.RetryCallState) -> None:
    logger.info("attempt %d failed, next in %.1f s: %s", state.attempt_number, state.upcoming_sleep, _error(state))
