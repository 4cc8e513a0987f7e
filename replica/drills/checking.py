"""Making the checks of a drill: what was looked for, what was seen, and whether that will do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from replica.catalog import ProtectedVm
from replica.drills.checks import Check, Kind
from replica.drills.console import Console
from replica.errors import GodwitError, PlatformError
from replica.host import Host
from replica.model import Point
from replica.platforms.platform import GuestChannel, Platform, Power
from replica.stores.store import Store
from replica.verify import verify
from replica.workers import Workers

PING_SECONDS: Final = 5.0
ASK_AGAIN_SECONDS: Final = 0.25
LONGEST_OBSERVED: Final = 1000
MATCHED_CHARACTERS: Final = 65536  # of what a command prints
LARGEST_FILE_BYTES: Final = 64 << 20
LARGEST_PICTURE_BYTES: Final = 16 << 20
PNG: Final = b"\x89PNG\r\n\x1a\n"
SHA256: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a check. ``skipped``: it could not be made here, and counts neither for nor against."""

    name: str
    kind: str
    required: bool
    passed: bool
    observed: str
    seconds: float
    skipped: bool = False

    @property
    def stands_against(self) -> bool:
        """Whether a drill cannot have passed with it."""
        return self.required and not self.passed and not self.skipped


@dataclass(slots=True)
class Examiner:
    """Makes checks of one machine that was started, until ``deadline`` of the host's monotonic clock."""

    store: Store
    host: Host
    found: ProtectedVm
    point: Point
    platform: Platform
    machine: str
    deadline: float
    sleep: Callable[[float], None]
    workers: Workers = field(default_factory=Workers)
    picture: bytes | None = None
    answered_at: float | None = None  # by the host's monotonic clock
    _silent: bool = False  # it was waited for the guest to answer, in vain
    _console: Console | None = None

    def examine(self, check: Check) -> Outcome:
        """Make a check. Whatever goes wrong with it is what was observed."""
        begun = self._now()
        if check.kind is Kind.TCP:
            why = "not made: a drill's machine is in a network of its own, into which nothing reaches"
            return Outcome(check.name, check.kind.value, check.required, False, why, 0.0, skipped=True)
        try:
            passed, observed = self._made(check, min(begun + check.timeout_seconds, self.deadline))
        except GodwitError as error:
            told = error.message if isinstance(error, PlatformError) else str(error)  # its path is a socket's, here
            passed, observed = False, f"{told}; {error.hint}" if error.hint else told
        if check.kind.answers:
            self._silent = self._silent or not passed
            if passed and self.answered_at is None:
                self.answered_at = self._now()
        seconds = round(self._now() - begun, 3)
        return Outcome(check.name, check.kind.value, check.required, passed, observed[:LONGEST_OBSERVED], seconds)

    def take_picture(self) -> str | None:
        """Take a picture of the console, and return why there is none. Raises PlatformError."""
        taken = self.platform.screenshot(self.machine)
        if taken is None:
            return "the platform has no picture of the console"
        if not taken.startswith(PNG) or len(taken) > LARGEST_PICTURE_BYTES:
            return "what the platform gave as a picture is none, or too large"
        self.picture = taken
        return None

    def _now(self) -> float:
        return self.host.clock.monotonic()

    def _made(self, check: Check, until: float) -> tuple[bool, str]:
        if self._now() >= self.deadline:
            return False, "not made: the time of the drill was up"
        if check.kind.uses_channel and self._silent and self.answered_at is None:
            return False, "not made: the guest does not answer"
        ways: dict[Kind, Callable[[], tuple[bool, str]]] = {
            Kind.POINT: self._point,
            Kind.AGENT: lambda: self._agent(until),
            Kind.CONSOLE: lambda: self._console_line(check, until),
            Kind.COMMAND: lambda: self._program(check, until),
            Kind.SERVICE: lambda: self._program(check, until),
            Kind.FILE: lambda: self._file(check, until),
            Kind.SCREENSHOT: self._screenshot,
        }
        return ways[check.kind]()

    def _screenshot(self) -> tuple[bool, str]:
        why = self.take_picture()
        return why is None, why or f"{len(self.picture or b'')} bytes"

    def _point(self) -> tuple[bool, str]:
        report = verify(self.store, self.host, self.found, points=[self.point], full=True, workers=self.workers)
        wrong = [str(one.message) for verdict in report.verdicts for one in verdict.damage]
        if wrong:
            return False, f"point {self.point.point} is damaged: {wrong[0]}" + (
                f", and {len(wrong) - 1} more" if wrong[1:] else ""
            )
        return True, f"every block of point {self.point.point} has the hash that was taken when it was read"

    def _agent(self, until: float) -> tuple[bool, str]:
        channel = self._channel()
        return self._await(
            lambda: "its agent answers" if channel.ping(timeout_seconds=self._span(until, PING_SECONDS)) else None,
            until,
            "its agent did not answer",
        )

    def _console_line(self, check: Check, until: float) -> tuple[bool, str]:
        self._console = console = Console(self.platform, self.machine)
        pattern = re.compile(check.match or "")
        passed, observed = self._await(lambda: console.find(pattern), until, "no such line came")
        last = console.last[-1] if console.last else ""
        return passed, observed if passed else f"{observed}; the last line is {last!r:.400}"

    def _await(self, look: Callable[[], str | None], until: float, otherwise: str) -> tuple[bool, str]:
        """Look until there is something to see, the time is up, or the machine is off."""
        begun = self._now()
        while True:
            power = self.platform.power(self.machine)
            seen = look()
            if seen is not None:
                return True, seen
            if power in (Power.OFF, Power.GONE):
                return False, f"{otherwise}: the machine is {power.value}"
            if self._now() >= until:
                paused = "; the machine is paused: one of its disks cannot be read" if power is Power.PAUSED else ""
                return False, f"{otherwise} within {self._now() - begun:.0f} s{paused}"
            self.sleep(self._span(until, ASK_AGAIN_SECONDS))

    def _program(self, check: Check, until: float) -> tuple[bool, str]:
        channel = self._channel()
        is_service = check.kind is Kind.SERVICE
        command = ("systemctl", "is-active", "--", check.service) if is_service else check.command
        last: str | None = None  # what was seen when the program came to its end
        while True:
            ended, passed, observed = self._ran(channel, check, command, until)
            last = observed if ended or last is None else last
            if passed or not (is_service or check.retry) or self._now() >= until:
                return passed, last  # not that it did not end, where that was for want of time to ask once more
            self.sleep(self._span(until, ASK_AGAIN_SECONDS))

    def _ran(
        self, channel: GuestChannel, check: Check, command: tuple[str, ...], until: float
    ) -> tuple[bool, bool, str]:
        """Run the program once; return whether it ended, whether that will do, and what was seen."""
        try:
            status, output, errors = channel.execute(command, timeout_seconds=self._span(until))
        except PlatformError as error:
            return False, False, error.message
        said = output[: 4 * MATCHED_CHARACTERS].decode("utf-8", "replace")[:MATCHED_CHARACTERS]
        told = (said.strip() or errors[:MATCHED_CHARACTERS].decode("utf-8", "replace").strip())[:400]
        if check.kind is Kind.SERVICE:
            return True, status == 0 and said.strip() == "active", told or f"status {status}"
        passed = status == check.status
        if check.match is not None:
            passed = passed and re.search(check.match, said, re.MULTILINE) is not None
        return True, passed, f"status {status}: {told}" if told else f"status {status}"

    def _file(self, check: Check, until: float) -> tuple[bool, str]:
        content = self._channel().read_file(
            check.path, timeout_seconds=self._span(until), largest_bytes=LARGEST_FILE_BYTES
        )
        digest = hashlib.sha256(content).hexdigest()
        return digest == check.sha256, f"SHA-256 {digest}, {len(content)} bytes"

    def _channel(self) -> GuestChannel:
        channel = self.platform.channel(self.machine)
        if channel is None:
            raise PlatformError("this platform has no way into a guest without a network")
        return channel

    def _span(self, until: float, most: float = float("inf")) -> float:
        return max(0.05, min(until - self._now(), most))
