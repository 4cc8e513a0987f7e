"""A stand-in for the QEMU guest agent: its protocol, file systems that can be frozen, programs that are run here."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import threading
from pathlib import Path
from typing import IO, Any


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
        self.asked: list[str] = []
        self.alters: dict[str, Any] = {}  # command → what it answers instead
        self._programs: list[subprocess.Popen[bytes]] = []
        self._files: dict[int, IO[bytes]] = {}
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
                    request = json.loads(line.rpartition(b"\xff")[2])
                    self.asked.append(request["execute"])
                    answer = self._answer(request)
                    if not self.silent and answer:
                        peer.sendall(answer)

    def _answer(self, request: dict[str, Any]) -> bytes:  # noqa: PLR0911 - one for each kind of command
        command = request["execute"]
        if command in self.refuses:
            return b'{"error": {"class": "GenericError", "desc": "not today"}}\n'
        if command in self.alters:
            return json.dumps({"return": self.alters[command]}).encode() + b"\n"
        if command == "guest-shutdown":
            return b""  # no answer where it is obeyed
        if command.startswith(("guest-exec", "guest-file-")) or command == "guest-ping":
            try:
                return json.dumps({"return": self._act(command, request.get("arguments", {}))}).encode() + b"\n"
            except OSError as error:
                return json.dumps({"error": {"class": "GenericError", "desc": str(error)}}).encode() + b"\n"
        result: object = "frozen" if self.frozen else "thawed"
        if command == "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"
        if command == "guest-fsfreeze-freeze":
            self.frozen = bool(self.file_systems)
            self.frozen_once.set()
            result = self.file_systems
        elif command == "guest-fsfreeze-thaw":
            result = self.file_systems if self.frozen else 0
            self.frozen = False
            self.thawed_again.set()
        return json.dumps({"return": result}).encode() + b"\n"

    def _act(self, command: str, arguments: dict[str, Any]) -> object:  # noqa: PLR0911
        """Do what the agent would do in its guest, on this machine."""
        if command == "guest-exec":
            program = [arguments["path"], *arguments.get("arg", [])]
            pipe = subprocess.PIPE
            self._programs.append(subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe))
            return {"pid": len(self._programs) - 1}
        if command == "guest-exec-status":
            return self._status(arguments["pid"])
        if command == "guest-file-open":
            handle = 1000 + len(self._files)
            self._files[handle] = Path(arguments["path"]).open(arguments["mode"])  # noqa: SIM115
            return handle
        if command == "guest-ping":
            return {}
        file = self._files[arguments["handle"]]
        if command == "guest-file-write":
            return {"count": file.write(base64.b64decode(arguments["buf-b64"])), "eof": False}
        if command == "guest-file-read":
            content = file.read(arguments["count"])
            eof = len(content) < arguments["count"]
            return {"count": len(content), "buf-b64": base64.b64encode(content).decode(), "eof": eof}
        if command == "guest-file-close":
            file.close()
        else:
            file.flush()
        return {}

    def _status(self, number: int) -> dict[str, Any]:
        program = self._programs[number]
        try:
            said = program.communicate(timeout=0.01)
        except subprocess.TimeoutExpired:
            return {"exited": False}
        answer: dict[str, Any] = {"exited": True}
        status = program.returncode
        answer |= {"signal": -status} if status < 0 else {"exitcode": status}
        return answer | {
            name: base64.b64encode(data).decode()
            for name, data in zip(("out-data", "err-data"), said, strict=True)
            if data
        }
