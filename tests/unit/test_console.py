"""The serial console of a machine, read in pieces: a guest may have said any amount."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from replica.drills.console import LAST_LINES, LONGEST_LINE, MOST_PIECES, Console
from replica.errors import PlatformError
from replica.platforms.console import PIECE_BYTES, HasConsole, last_of, piece_of
from replica.platforms.folder import MachineFolders
from replica.platforms.libvirt.platform import LibvirtPlatform
from replica.platforms.platform import Platform
from replica.platforms.qemu import QemuPlatform
from tests.support.engine import make_host


@dataclass
class Saying:
    """A platform whose machine says what the test says."""

    text: bytes = b""
    asked: list[tuple[int, int]] = field(default_factory=list)

    def console(self, name: str) -> str:
        raise AssertionError("the whole of it is never asked for")

    def said(self, name: str, start_bytes: int) -> bytes:
        piece = self.text[start_bytes : start_bytes + PIECE_BYTES]
        self.asked.append((start_bytes, len(piece)))
        return piece


def console_of(saying: Saying) -> Console:
    return Console(cast(Platform, saying), "web")


def test_lines_are_found_once_and_what_was_read_is_not_read_again() -> None:
    saying = Saying(b"SeaBIOS\r\nREADY 1\r\n")
    console = console_of(saying)
    ready = re.compile("^READY")
    assert console.find(ready) == "READY 1"
    assert console.find(ready) is None
    saying.text += b"REA"
    assert console.find(ready) is None
    saying.text += "DY ü".encode()[:-1]  # amidst a character
    saying.text += "ü\n".encode()[1:]
    assert console.find(ready) == "READY ü"
    assert [start for start, _ in saying.asked] == sorted(start for start, _ in saying.asked)
    assert sum(size for _, size in saying.asked) == len(saying.text)


def test_a_guest_that_says_too_much_is_read_in_bounded_pieces() -> None:
    saying = Saying(b"x" * (PIECE_BYTES * (MOST_PIECES + 3)) + b"\nREADY\n")
    console = console_of(saying)
    assert console.find(re.compile("^READY")) is None  # at one look no more than so many pieces
    assert len(saying.asked) == MOST_PIECES
    assert console.find(re.compile("^READY")) == "READY"
    saying.text += b"".join(b"line %d\n" % number for number in range(100))
    assert console.find(re.compile("no such")) is None
    assert (len(console.last), console.last[-1]) == (LAST_LINES, "line 99")
    assert max(map(len, console.last)) <= LONGEST_LINE


def test_of_a_line_that_never_ends_the_end_is_kept() -> None:
    saying = Saying(b"x" * (3 * PIECE_BYTES) + b"READY")
    console = console_of(saying)
    assert console.find(re.compile("READY$")) is not None
    assert len(console._open_line) == LONGEST_LINE


def test_a_platform_that_keeps_nothing_is_told_apart() -> None:
    with pytest.raises(PlatformError, match="keeps nothing"):
        Console(cast(Platform, object()), "web")


@pytest.mark.parametrize("kind", [QemuPlatform, LibvirtPlatform])
def test_of_a_log_of_any_size_the_end_is_shown_and_pieces_are_given(tmp_path: Path, kind: type) -> None:
    host = make_host(tmp_path)
    made = kind(host)
    folder = MachineFolders(host, made.name).of("web")
    assert isinstance(made, HasConsole)
    platform: HasConsole = made
    folder.make()
    assert (platform.console("web"), platform.said("web", 0)) == ("", b"")
    with (folder.path / "console.log").open("wb") as file:
        file.write(b"first")
        file.seek(1 << 36)  # 64 GiB, of which next to nothing is there
        file.write(b"the last words")
    told = platform.console("web")
    assert len(told) == PIECE_BYTES and told.endswith("the last words")
    assert platform.said("web", 0)[:5] == b"first" and len(platform.said("web", 0)) == PIECE_BYTES
    assert platform.said("web", (1 << 36) + 4) == b"last words"
    assert platform.said("web", 1 << 37) == b""
    (folder.path / "console.log").unlink()
    (folder.path / "console.log").mkdir()
    with pytest.raises(PlatformError, match="cannot read the console"):
        platform.said("web", 0)


def test_the_end_of_a_short_log_is_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"a\xff\n")
    assert (last_of(path), piece_of(path, 2)) == ("a\ufffd\n", b"\n")
