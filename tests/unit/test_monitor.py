"""QEMU's monitor as it should not be: silent, cut off, endless, no JSON, no QMP; and the order of its answers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replica import monitor
from replica.errors import SourceError
from replica.monitor import Monitor, MonitorError, MonitorGoneError

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'

Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serve one client: send ``first``, then for each line received the next of ``answers``, then hang up or wait."""
    opened: list[socket.socket] = []

    def start(first: bytes, *answers: bytes, stay: bool = False) -> str:
        path = str(tmp_path / "qmp.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        opened.append(listener)

        def run() -> None:
            try:
                peer = listener.accept()[0]
                opened.append(peer)
                peer.sendall(first)
                lines = peer.makefile("rb")
                for answer in answers:
                    number = json.loads(lines.readline())["id"]
                    peer.sendall(answer.replace(b"ID", str(number).encode()))
                if not stay:
                    peer.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

        threading.Thread(target=run, daemon=True).start()
        return path

    yield start
    for one in opened:
        one.close()


OK = b'{"return": {}, "id": ID}\r\n'


def test_events_and_answers_to_older_commands_are_stepped_over(serve: Serve) -> None:
    answer = b'{"event": "STOP"}\r\n{"return": 1, "id": 999}\r\n{"return": [{"a": 1}], "id": ID}\r\n'
    with Monitor(serve(GREETING, OK, answer)) as found:
        assert found.rows("query-something") == [{"a": 1}]


def test_a_refusal_carries_qemus_words(serve: Serve) -> None:
    refusal = b'{"error": {"class": "DeviceNotFound", "desc": "no such thing"}, "id": ID}\r\n'
    with Monitor(serve(GREETING, OK, refusal, OK)) as found:
        with pytest.raises(MonitorError, match="QEMU refuses blockdev-del: no such thing") as caught:
            found.execute("blockdev-del")
        assert caught.value.error_class == "DeviceNotFound"
        found.execute("quit")  # the connection is as good as before


@pytest.mark.parametrize(
    ("first", "answers"),
    [
        (b"", ()),
        (GREETING[:-1], ()),
        (b"SSH-2.0-OpenSSH_9.2\r\n", ()),
        (b'"QMP"\r\n', ()),
        (b'{"return": {}}\r\n', ()),
        (b"[" * 100_000 + b"\r\n", ()),
        (GREETING, ()),
        (GREETING, (b'{"id": ID}\r\n',)),
        (GREETING, (b'{"error": "text", "id": ID}\r\n',)),
        (GREETING, (b"\xff\xfe\r\n",)),
    ],
)
def test_what_is_no_monitor_is_said_to_be_none(serve: Serve, first: bytes, answers: tuple[bytes, ...]) -> None:
    with pytest.raises(MonitorGoneError):
        Monitor(serve(first, *answers))


def test_a_silent_monitor_is_given_up_with_advice(serve: Serve) -> None:
    with pytest.raises(MonitorGoneError, match="does not answer") as caught:
        Monitor(serve(b"", stay=True), timeout_seconds=0.1)
    assert "one client at a time" in str(caught.value.hint)


def test_a_message_without_end_takes_no_memory_without_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "MOST_MESSAGE_BYTES", 1 << 20)
    with pytest.raises(MonitorGoneError, match="without end"):
        Monitor(serve(b"x" * (4 << 20), stay=True))


def test_an_answer_of_another_form_is_no_list(serve: Serve) -> None:
    with (
        Monitor(serve(GREETING, OK, b'{"return": {"a": 1}, "id": ID}\r\n')) as found,
        pytest.raises(SourceError, match="is no list"),
    ):
        found.rows("query-jobs")


def test_an_absent_machine_is_named(tmp_path: Path) -> None:
    with pytest.raises(MonitorGoneError, match=r"nothing\.sock: QEMU's monitor cannot be reached"):
        Monitor(str(tmp_path / "nothing.sock"))
