"""The agent's endpoint on loopback: metrics as Prometheus reads them, and the status file."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from replica.errors import ConfigurationError

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
JSON: Final = "application/json"
TIMEOUT_SECONDS: Final = 10.0

# By path: the content type, and what gives the content, or None where there is none yet.
Pages = dict[str, tuple[str, Callable[[], str | None]]]


@contextmanager
def served(address: tuple[str, int], pages: Pages) -> Iterator[int]:
    """Serve the pages while the context lasts; gives the port. Raises ConfigurationError."""

    class Handler(BaseHTTPRequestHandler):
        timeout = TIMEOUT_SECONDS

        def do_GET(self) -> None:
            kind, content = pages.get(self.path, (TEXT, lambda: None))
            text = content()
            body = b"nothing here (yet)\n" if text is None else text.encode("utf-8", "backslashreplace")
            self.send_response(200 if text is not None else 404 if self.path not in pages else 503)
            self.send_header("Content-Type", kind if text is not None else TEXT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def version_string(self) -> str:
            return "godwit"

        def log_message(self, *_: object) -> None:
            """Say nothing: a scrape every few seconds is no event."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Say nothing: a client that went away is no event."""

    try:
        server = Server(address, Handler)
    except OSError as error:
        raise ConfigurationError(
            f"the endpoint for metrics cannot listen on {address[0]} port {address[1]}: {error.strerror or error}",
            hint="choose another port with metrics of [agent]",
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="endpoint", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
