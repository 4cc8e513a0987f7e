"""How much is done at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

BATCHES_PER_THREAD: Final = 3
LOCAL: Final = ("file:", "memory:")


@dataclass(frozen=True, slots=True)
class Workers:
    """Threads that read, hash and compress, and uploads under way beside them.

    Memory: about 16 MiB for each thread, and 16 MiB for each upload and one more.
    """

    threads: int = 2
    uploads: int = 3

    @property
    def batches(self) -> int:
        """How many batches are under way or waiting to be taken."""
        return self.threads * BATCHES_PER_THREAD

    def fetches(self, store_url: str) -> int:
        """Return how many reads from the store are under way at once.

        From a store across a network some wait for answers while others unpack. A folder answers at once: more
        threads than processors would only stand in each other's way.
        """
        return self.threads if store_url.startswith(LOCAL) else self.threads + self.uploads


def default_workers() -> Workers:
    """Return what suits this machine: a thread for each processor, up to eight."""
    return Workers(threads=max(2, min(8, os.cpu_count() or 2)), uploads=3)
