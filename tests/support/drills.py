"""A guest that drills can look at: a platform in memory whose machines answer, or do not."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from replica.drills.checks import Check, Kind, Terms
from replica.drills.recording import Recorded, drill
from replica.errors import PlatformError
from replica.failover.failover import Order
from replica.failover.means import Means
from replica.platforms.console import PIECE_BYTES
from replica.platforms.platform import GuestChannel, Power
from tests.support.engine import FakeClock
from tests.support.failover import Site
from tests.support.fake_platform import FakePlatform

Answer = tuple[int, bytes, bytes]
PICTURE = b"\x89PNG\r\n\x1a\n" + zlib.compress(b"what was on the screen")


@dataclass(slots=True)
class FakeGuest:
    """What runs in a machine. Its agent answers after so many seconds, None for never."""

    clock: FakeClock
    answers_after_seconds: float | None = 20.0
    says: str = "GODWIT-READY firmware=bios"
    programs: dict[tuple[str, ...], Answer] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    execution_seconds: float = 0.5
    begun: float | None = None

    @property
    def is_up(self) -> bool:
        after = self.answers_after_seconds
        return after is not None and self.begun is not None and self.clock.monotonic() >= self.begun + after

    def ping(self, *, timeout_seconds: float) -> bool:
        return self.is_up

    def execute(self, command: Sequence[str], *, timeout_seconds: float) -> Answer:
        self.clock.advance(min(self.execution_seconds, timeout_seconds))
        if not self.is_up or self.execution_seconds > timeout_seconds:
            raise PlatformError(f"{command[0]} did not end in the guest within {timeout_seconds:.0f} s")
        return self.programs.get(tuple(command), (127, b"", b"not found"))

    def write_file(self, path: str, content: bytes, *, timeout_seconds: float) -> None:
        self.files[path] = content

    def read_file(self, path: str, *, timeout_seconds: float, largest_bytes: int = 64 << 20) -> bytes:
        if path not in self.files:
            raise PlatformError(f"{path}: no such file in the guest")
        return self.files[path]


@dataclass(slots=True)
class GuestPlatform(FakePlatform):
    """``FakePlatform`` with guests: all of its machines are the same one."""

    guest: FakeGuest | None = None
    picture: bytes | None = PICTURE
    ends_by_itself: bool = False  # the guest turns its machine off at once

    def start(self, name: str) -> None:
        FakePlatform.start(self, name)
        if self.guest is not None:
            self.guest.begun = self.guest.clock.monotonic()

    def channel(self, name: str) -> GuestChannel | None:
        self._call("channel", name, lambda: None)
        return self.guest

    def screenshot(self, name: str) -> bytes | None:
        self._call("screenshot", name, lambda: None)
        return self.picture

    def console(self, name: str) -> str:
        self._call("console", name, lambda: None)
        if self.ends_by_itself:
            self.hypervisor.machines[name].power = Power.OFF
        return "SeaBIOS\r\n" + (f"{self.guest.says}\r\n" if self.guest is not None and self.guest.is_up else "")

    def said(self, name: str, start_bytes: int) -> bytes:
        return self.console(name).encode()[start_bytes : start_bytes + PIECE_BYTES]


@dataclass(slots=True)
class Range:
    """Where drills are made: a site, a guest, a folder of evidence."""

    site: Site
    guest: FakeGuest
    folder: Path

    def platform(self) -> GuestPlatform:
        return GuestPlatform(self.site.hypervisor, guest=self.guest)

    def means(self, platform: FakePlatform | None = None) -> Means:
        chosen = platform or self.platform()
        return replace(self.site.means(platform=chosen), sleep=self.guest.clock.advance)

    def drill(
        self,
        *checks: Check,
        platform: FakePlatform | None = None,
        point: int | None = None,
        means: Means | None = None,
        timeout_seconds: float = 900,
        adapt: Callable[[Terms], Terms] = lambda terms: terms,
    ) -> Recorded:
        terms = adapt(Terms(checks, timeout_seconds))
        return drill(means or self.means(platform), Order(point=point), terms, self.folder)


def make_range(site: Site, folder: Path) -> Range:
    clock = site.lab.host.clock
    assert isinstance(clock, FakeClock)
    guest = FakeGuest(
        clock,
        programs={
            ("systemctl", "is-active", "--", "nginx"): (0, b"active\n", b""),
            ("hostname",): (0, b"web-1\n", b""),
        },
        files={"/etc/motd": b"welcome\n"},
    )
    return Range(site, guest, folder)


def check(kind: Kind, **fields: object) -> Check:
    given: dict[str, object] = {"name": kind.value, **fields}
    return Check(kind, **given)  # type: ignore[arg-type]
