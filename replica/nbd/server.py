"""An NBD server: disks as exports behind a socket of this machine (docs/adr/0009 says why it is our own).

It listens on a socket in the file system, which only its owner may open, or on a loopback address: there is no TLS
yet, and without it nothing beyond this machine is served.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Final, Self

from replica.errors import UsageError
from replica.nbd.negotiation import Negotiation
from replica.nbd.service import Service
from replica.nbd.wire import Address, NbdError, TcpAddress, UnixAddress
from vhdx.disk import Disk

MOST_CONNECTIONS: Final = 64
WORKERS: Final = 8
LONGEST_SOCKET_NAME_BYTES: Final = 107
HANDSHAKE_SECONDS: Final = 30.0


class Server:
    """Serves disks by name until it is closed. ``report`` takes what goes wrong with a disk or a client."""

    def __init__(
        self,
        exports: Mapping[str, Disk],
        address: Address,
        *,
        report: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """Listen; port 0 takes a free one. Raises UsageError for an address beyond this machine, NbdError."""
        self._exports = exports
        self._report = report
        # Whoever writes to a disk must be alone with it; what is never written may be read by all at once.
        self._guards = {id(disk): nullcontext() if disk.read_only else threading.Lock() for disk in exports.values()}
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closing = False
        self._listener, self.address = _listen(address)
        self._pool = ThreadPoolExecutor(WORKERS, "nbd")
        self._acceptor = threading.Thread(target=self._accept, name="nbd-listener", daemon=True)
        self._acceptor.start()

    @property
    def connections(self) -> int:
        """How many clients there are now."""
        with self._lock:
            return len(self._connections)

    def close(self) -> None:
        """Take no more clients, end the connections, wait for what is under way. Safe to repeat."""
        with self._lock:
            self._closing = True
            connections, threads = list(self._connections), list(self._threads)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if isinstance(self.address, UnixAddress):
            Path(self.address.path).unlink(missing_ok=True)
        for one in connections:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        for thread in threads:
            thread.join()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._closing or len(self._connections) >= MOST_CONNECTIONS:
                    connection.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(connection,), name="nbd-client", daemon=True)
                self._connections.add(connection)
                self._threads.add(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                if connection.family != getattr(socket, "AF_UNIX", None):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(HANDSHAKE_SECONDS)  # a client that never asks must not hold a place for ever
                agreement = Negotiation(connection, self._exports).run()
                connection.settimeout(None)
                if agreement is not None:
                    guard = self._guards[id(agreement.disk)]
                    Service(connection, agreement, self._pool, self._report, guard).run()
        except (NbdError, OSError) as error:
            if not self._closing:
                self._report(error)
        finally:
            with self._lock:
                self._connections.discard(connection)
                self._threads.discard(threading.current_thread())


def _listen(address: Address) -> tuple[socket.socket, Address]:
    if isinstance(address, TcpAddress):
        return _listen_tcp(address)
    if sys.platform == "win32":
        raise UsageError("this system has no sockets in the file system", hint="listen on 127.0.0.1")
    else:  # noqa: RET506 - mypy looks at one branch only, by platform
        if len(address.path.encode()) > LONGEST_SOCKET_NAME_BYTES:
            raise UsageError(
                f"a socket's name has at most {LONGEST_SOCKET_NAME_BYTES} bytes", path=address.path, hint="shorten it"
            )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(address.path)
            Path(address.path).chmod(0o600)
            listener.listen(MOST_CONNECTIONS)
        except OSError as error:
            listener.close()
            raise NbdError(f"cannot listen: {error.strerror or error}", path=address.path) from error
        return listener, address


def _listen_tcp(address: TcpAddress) -> tuple[socket.socket, Address]:
    try:
        found = ipaddress.ip_address("127.0.0.1" if address.host == "localhost" else address.host)
    except ValueError as error:
        raise UsageError(f"{address.host!r} is no address", hint="write 127.0.0.1 or ::1") from error
    if not found.is_loopback:
        raise UsageError(
            f"{found} can be reached from other machines, and the disk would be open to them",
            hint="listen on 127.0.0.1, and let ssh carry it: ssh -L 10809:127.0.0.1:10809 HOST",
        )
    listener = socket.socket(socket.AF_INET if found.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(found), address.port))
        listener.listen(MOST_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise NbdError(f"cannot listen on {found}, port {address.port}: {error.strerror or error}") from error
    return listener, TcpAddress(str(found), listener.getsockname()[1])
