"""A stand-in for the QEMU guest agent: its protocol, and file systems that can be frozen."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path


class FakeAgent:
    """A guest agent on a socket, with a guest whose file systems can be frozen."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.frozen = False
        self.frozen_once = threading.Event()
        self.thawed_again = threading.Event()
        self.refuses: set[str] = set()
        self.silent = False
        self.file_systems = 2
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                peer = self._listener.accept()[0]
            except OSError:
                return
            with peer, peer.makefile("rb") as lines:
                for line in lines:
                    answer = self._answer(json.loads(line.rpartition(b"\xff")[2]))
                    if not self.silent:
                        peer.sendall(answer)

    def _answer(self, request: dict[str, object]) -> bytes:
        command = request["execute"]
        if command in self.refuses:
            return b'{"error": {"class": "GenericError", "desc": "not today"}}\n'
        result: object = "frozen" if self.frozen else "thawed"
        if command == "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"  # type: ignore[index]
        if command == "guest-fsfreeze-freeze":
            self.frozen = bool(self.file_systems)
            self.frozen_once.set()
            result = self.file_systems
        elif command == "guest-fsfreeze-thaw":
            result = self.file_systems if self.frozen else 0
            self.frozen = False
            self.thawed_again.set()
        return json.dumps({"return": result}).encode() + b"\n"
