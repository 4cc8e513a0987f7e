"""Sees to it that a machine whose disks are replicated is off, and stays so while its last point is made.

Disk files are taken as a writer takes them, so that no other can. A guest under QEMU is asked to shut down while QEMU
is told to stay: its disks are read for the last time through it, its record of changes included; then it is ended. A
domain of libvirt is shut down, and read as ``replica.libvirt.stopping`` says; a VM on a Hyper-V host is shut down, and
read beneath a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Protocol

from replica.errors import SourceError
from replica.model import SourceDisk
from replica.source import HYPERV, LIBVIRT, LIVE, is_live
from vhdx.errors import DiskBusyError, DiskError
from vhdx.formats import chain_of
from vhdx.formats import open_disk as open_image
from vhdx.osfile import open_file

SHUTDOWN_SECONDS: Final = 300.0
POLL_SECONDS: Final = 0.5
ASK_AGAIN_SECONDS: Final = 10.0  # a guest that still starts up does not hear the power button
AGENT_SECONDS: Final = 2.0  # how long a guest's agent is waited for, before the power button is pressed


class Stopped(Protocol):
    """A machine that is off."""

    def check(self) -> None:
        """Return if it has been off since. Raises SourceError."""

    def finish(self) -> None:
        """Let nothing of it stay running: its last point is made."""


@contextmanager
def stopped(
    sources: Sequence[SourceDisk],
    *,
    timeout_seconds: float = SHUTDOWN_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Stopped]:
    """Shut down the machine that has these disks; it is off while the context lasts, as far as that can be seen to.

    Raises SourceError where it stays on, or a disk file is in use.
    """
    first = sources[0].path
    if first.startswith(LIVE):
        yield _stop_qemu(first, timeout_seconds, sleep)
    elif first.startswith(LIBVIRT):
        from replica.libvirt.address import LibvirtAddress  # noqa: PLC0415 - files need none of it
        from replica.libvirt.stopping import stopped_domain  # noqa: PLC0415

        with stopped_domain(LibvirtAddress.parse(first), timeout_seconds=timeout_seconds, sleep=sleep) as domain:
            yield domain
    elif first.startswith(HYPERV):
        yield _stop_vm(first, timeout_seconds, sleep)
    elif is_live(first):
        raise SourceError(
            "a machine of this kind cannot be shut down from here",
            path=first,
            hint="shut it down, replicate it once more, and say --unplanned: its newest point is then all of it",
        )
    else:
        with _taken([Path(one.path) for one in sources]) as files:
            yield files


class _Files:
    """Disk files that nobody else can write to: the locks are held outside."""

    def check(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


@contextmanager
def _taken(paths: Sequence[Path]) -> Iterator[_Files]:
    with ExitStack() as stack:
        for path in paths:
            with open_image(path) as disk:
                files = chain_of(disk)
            for one in files:
                try:
                    stack.callback(open_file(one, writable=True).close)
                except DiskBusyError as error:
                    raise SourceError(
                        "the disk is in use: a planned failover loses nothing only where the VM is off",
                        path=str(one),
                        hint="shut the VM down; if it cannot be reached any more, say --unplanned",
                    ) from error
                except DiskError:
                    continue  # it may not be written to by us: that it did not change is proven by its content
        yield _Files()


# -- QEMU -------------------------------------------------------------------------------------------------------------


class _Qemu:
    """A QEMU whose guest is off."""

    def __init__(self, socket: str) -> None:
        self._socket = socket

    def check(self) -> None:
        """See that the guest is still off; QEMU lets it go on only after a reset, which shows."""
        from replica.monitor import Monitor  # noqa: PLC0415 - files need none of it

        with Monitor(self._socket) as monitor:
            status = monitor.execute("query-status").get("status")
        if status != "shutdown":
            raise SourceError(f"the guest was started again: QEMU says that it is {status}", path=self._socket)

    def finish(self) -> None:
        """End QEMU."""
        from replica.monitor import Monitor, MonitorGoneError  # noqa: PLC0415

        try:
            with Monitor(self._socket) as monitor:
                monitor.execute("quit")
        except MonitorGoneError:
            return


def _stop_qemu(path: str, timeout_seconds: float, sleep: Callable[[float], None]) -> _Qemu:
    from replica.monitor import Monitor, MonitorError, MonitorGoneError  # noqa: PLC0415
    from replica.platforms.channel import AgentChannel  # noqa: PLC0415
    from replica.qemu import LiveAddress  # noqa: PLC0415

    address = LiveAddress.parse(path)
    socket = address.monitor
    agent = None if address.agent is None else AgentChannel(address.agent)
    deadline = time.monotonic() + timeout_seconds
    try:
        with Monitor(socket) as monitor:
            try:
                monitor.execute("set-action", shutdown="pause")
            except MonitorGoneError:
                raise
            except MonitorError as error:
                raise SourceError(
                    f"QEMU would end with its guest, and its record of changes with it: {error.message}",
                    path=socket,
                    hint="shut the VM down, protect its disk files by 'godwit protect --update', and fail over again",
                ) from error
            begun = ask_at = time.monotonic()
            while monitor.execute("query-status").get("status") != "shutdown":
                if time.monotonic() > deadline:
                    monitor.execute("set-action", shutdown="poweroff")  # as it was, unless it was started otherwise
                    raise SourceError(
                        f"the guest did not shut down within {timeout_seconds:.0f} s",
                        path=socket,
                        hint="shut it down from inside, and fail over again; or say --unplanned",
                    )
                if time.monotonic() >= ask_at:
                    heard = agent is not None and agent.shut_down(timeout_seconds=AGENT_SECONDS)
                    if not heard or ask_at > begun:  # what the agent was told may have failed: it tells nobody
                        monitor.execute("system_powerdown")
                    ask_at = time.monotonic() + ASK_AGAIN_SECONDS
                sleep(POLL_SECONDS)
    except MonitorGoneError as error:
        raise SourceError(
            f"the source cannot be shut down in order: {error.message}",
            path=socket,
            hint="start it again, or say --unplanned",
        ) from error
    return _Qemu(socket)


# -- Hyper-V ----------------------------------------------------------------------------------------------------------


def _stop_vm(path: str, timeout_seconds: float, sleep: Callable[[float], None]) -> Stopped:
    from replica.hyperv import stopping  # noqa: PLC0415 - files need none of it

    return stopping.stop(path, timeout_seconds, sleep)
