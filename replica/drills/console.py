"""What a guest says on its serial port, read piece by piece: it may say anything, and any amount of it."""

from __future__ import annotations

import codecs
import re
from typing import Final

from replica.errors import PlatformError
from replica.platforms.console import PIECE_BYTES, HasConsole
from replica.platforms.platform import Platform

MOST_PIECES: Final = 16  # at one look: a guest may write faster than anybody reads
LONGEST_LINE: Final = 4096
LAST_LINES: Final = 20


class Console:
    """The console of one machine, from its beginning on. Raises PlatformError where the platform keeps none."""

    def __init__(self, platform: Platform, name: str) -> None:
        if not isinstance(platform, HasConsole):
            raise PlatformError("this platform keeps nothing of what its machines say on their serial ports")
        self._platform: HasConsole = platform
        self._name = name
        self._offset = 0
        self._open_line = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a piece may end amidst a character
        self.last: tuple[str, ...] = ()  # of the lines that were read

    def find(self, pattern: re.Pattern[str]) -> str | None:
        """Return the first line that matches, of those that have come since the last call; None if none does."""
        for _ in range(MOST_PIECES):
            piece, is_last = self._piece()
            *lines, self._open_line = (self._open_line + piece).replace("\r", "\n").split("\n")
            self._open_line = self._open_line[-LONGEST_LINE:]
            shown = [line[:LONGEST_LINE] for line in lines if line]
            self.last = (*self.last, *shown)[-LAST_LINES:]
            for line in (*shown, self._open_line):
                if line and pattern.search(line):
                    return line
            if is_last:
                break
        return None

    def _piece(self) -> tuple[str, bool]:
        """Return what comes next, and whether that is all for now."""
        held = self._platform.said(self._name, self._offset)
        self._offset += len(held)
        return self._decoder.decode(held), len(held) < PIECE_BYTES
