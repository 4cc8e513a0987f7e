"""What signals mean to the agent: SIGTERM and SIGINT stop it, a second one at once; SIGHUP has it reread."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from replica.daemon.mailbox import Mailbox, Word

INTERRUPTED: Final = 130


def leave_at_once() -> None:
    """End the process where it stands, as a crash would; what that leaves the next start handles."""
    os._exit(INTERRUPTED)


@contextmanager
def heeded(mailbox: Mailbox, at_once: Callable[[], None] = leave_at_once) -> Iterator[None]:
    """Pass signals on to the mailbox while the context lasts. For the main thread."""
    told = False

    def stop(_: int, __: Any) -> None:
        nonlocal told
        if told:
            at_once()
        told = True
        mailbox.put(Word.STOP)

    def reload(_: int, __: Any) -> None:
        mailbox.put(Word.RELOAD)

    handlers: dict[int, Callable[[int, Any], None]] = {signal.SIGTERM: stop, signal.SIGINT: stop}
    hangup = getattr(signal, "SIGHUP", None)  # there is none on Windows
    if hangup is not None:
        handlers[hangup] = reload
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
