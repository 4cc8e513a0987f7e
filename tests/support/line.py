"""A line to a server that can be cut: connections pass through it, until they do not."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit

PIECE_BYTES = 1 << 16


class Line:
    """Listens on a port of its own, and passes on what comes to the server at ``endpoint``."""

    def __init__(self, endpoint: str) -> None:
        target = urlsplit(endpoint)
        assert target.hostname is not None and target.port is not None
        self._target = target.hostname, target.port
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._port = 0
        self.restore()

    @property
    def endpoint(self) -> str:
        """Where clients find the server."""
        return f"http://127.0.0.1:{self._port}"

    def restore(self) -> None:
        """Let connections through again, at the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(128)
        self._port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """End every connection, and refuse new ones."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
                if self._listener is not listener:  # it was cut meanwhile
                    client.close()
                    server.close()
                    continue
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                target.sendall(piece)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open.discard(source)
        source.close()
