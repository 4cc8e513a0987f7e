"""A store that keeps to a bandwidth: what it sends waits before it goes, what it received is waited for afterwards."""

from __future__ import annotations

from collections.abc import Callable

from replica.daemon.around import AroundStore
from replica.daemon.bandwidth import Bucket
from replica.stores.store import ObjectData, Store


class LimitedStore(AroundStore):
    """A store whose bytes go through a bucket that others share.

    It stands below the retries, so that what is sent again counts again. Leases are counted, and never kept waiting:
    one that cannot be renewed in time would be taken over.
    """

    def __init__(self, inner: Store, bucket: Bucket, sleep: Callable[[float], None]) -> None:
        super().__init__(inner)
        self._bucket = bucket
        self._sleep = sleep

    def before(self, kind: str, key: str, data: ObjectData = b"") -> None:
        """Wait until what is sent may go."""
        size_bytes = memoryview(data).nbytes
        if kind == "create":
            self._bucket.take(size_bytes, self._sleep)
        elif size_bytes:
            self._bucket.note(size_bytes)

    def after(self, received_bytes: int) -> None:
        """Wait for what was received: how much it would be was not known before."""
        self._bucket.take(received_bytes, self._sleep)
