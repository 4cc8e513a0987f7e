"""Recovery machines under a real QEMU, started from a store at once: what survives what, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from replica.errors import LeaseHeldError, PlatformError
from replica.monitor import Monitor
from replica.platforms import overlay, servant
from replica.platforms.platform import DiskSpec, Power
from replica.platforms.qemu import QemuPlatform
from replica.platforms.qemu.files import QemuFiles
from replica.platforms.sockets import socket_path
from replica.qemu import LiveAddress
from tests.support import running_qemu
from tests.support.recovery import SAID, SECTOR, WAIT_SECONDS, WRITTEN_SECTOR, Recovery, boot_sector, wait_until

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="recovery machines run on Linux"),
    pytest.mark.skipif(bool(running_qemu.missing()), reason=f"not installed: {running_qemu.missing()}"),
    pytest.mark.xdist_group("machines"),
]

NAME = "web 1, test"
BITMAP = "since-start"


@pytest.fixture
def recovery(tmp_path: Path) -> Recovery:
    return Recovery(tmp_path, disks=2)


@pytest.fixture
def platform(recovery: Recovery) -> Iterator[QemuPlatform]:
    found = QemuPlatform(recovery.host, accelerator="tcg", options=())
    yield found
    found.delete(NAME)


def started(recovery: Recovery, platform: QemuPlatform) -> QemuFiles:
    """Define and start the machine, and wait until its boot sector has run."""
    folder = platform.folder(NAME)
    spec = recovery.spec(folder, NAME, bitmap=BITMAP)
    platform.define(spec)
    assert platform.power(NAME) is Power.OFF
    platform.start(NAME)
    wait_until(lambda: SAID in platform.console(NAME), "the boot sector has run")
    return QemuFiles(folder)


def bitmaps(path: Path) -> list[dict[str, object]]:
    """Return the persistent bitmaps of an image."""
    command = ["qemu-img", "info", "-U", "--output=json", str(path)]
    said = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return list(said["format-specific"]["data"].get("bitmaps", []))


def dirty_bytes(platform: QemuPlatform, number: int) -> int:
    """Return how much the bitmap of a running machine's disk says was written."""
    with Monitor(str(QemuFiles(platform.folder(NAME)).monitor)) as monitor:
        for row in monitor.rows("query-named-block-nodes", flat=True):
            if row["node-name"] == f"disk{number}":
                (bitmap,) = row["dirty-bitmaps"]
                assert bitmap["name"] == BITMAP and bitmap["persistent"] and bitmap["recording"]
                return int(bitmap["count"])
    raise AssertionError(number)


def content(path: Path, tmp_path: Path) -> bytes:
    """Return what a hydrated disk holds."""
    target = tmp_path / "content.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(target)], check=True)
    return target.read_bytes()


def test_a_machine_runs_from_the_store_is_hydrated_and_needs_the_store_no_more(
    recovery: Recovery, platform: QemuPlatform, tmp_path: Path
) -> None:
    files = started(recovery, platform)
    folder = files.folder.path
    assert platform.power(NAME) is Power.RUNNING
    assert [(d.number, d.hydrated) for d in platform.disks(NAME)] == [(0, False), (1, False)]
    assert platform.disks(NAME)[0].remaining_bytes == 16 << 20
    address = LiveAddress.parse(platform.disks(NAME)[0].address)
    assert address == LiveAddress(str(files.replication), "disk0", str(files.agent))
    assert servant.is_running(folder)
    wait_until(lambda: dirty_bytes(platform, 0) > 0, "the guest's write is recorded")
    platform.start(NAME)  # again: nothing

    platform.hydrate(NAME)
    wait_until(lambda: all(d.hydrated for d in platform.disks(NAME)), "the disks are whole")
    platform.hydrate(NAME)  # again: nothing
    wait_until(lambda: not servant.is_running(folder), "the server has ended by itself")
    # What hydration copied is none of the guest's writes.
    assert (dirty_bytes(platform, 0), dirty_bytes(platform, 1)) == (65536, 0)
    assert platform.power(NAME) is Power.RUNNING

    platform.stop(NAME, force=True)
    assert platform.power(NAME) is Power.OFF
    assert [(d.hydrated, d.remaining_bytes, d.address) for d in platform.disks(NAME)] == [
        (True, 0, str(files.disk(number))) for number in (0, 1)
    ]
    assert [one["name"] for one in bitmaps(files.disk(0))] == [BITMAP]
    assert "in-use" not in bitmaps(files.disk(0))[0]["flags"]  # type: ignore[operator]

    (tmp_path / "store").rename(tmp_path / "lost")
    before = recovery.sources[0].read_bytes()
    at = WRITTEN_SECTOR * SECTOR
    assert content(files.disk(0), tmp_path) == before[:at] + boot_sector() + before[at + SECTOR :]
    assert content(files.disk(1), tmp_path) == recovery.sources[1].read_bytes()
    files.console.unlink()
    platform.start(NAME)
    wait_until(lambda: SAID in platform.console(NAME), "the boot sector has run without the store")

    platform.delete(NAME)
    assert platform.power(NAME) is Power.GONE
    assert not folder.exists()
    platform.delete(NAME)  # again: nothing


def test_the_picture_of_the_screen_is_a_png(recovery: Recovery, platform: QemuPlatform) -> None:
    started(recovery, platform)
    picture = platform.screenshot(NAME)
    assert picture is not None and picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
    platform.stop(NAME, force=True)
    assert platform.screenshot(NAME) is None


def test_a_killed_machine_is_seen_as_off_and_starts_again(recovery: Recovery, platform: QemuPlatform) -> None:
    files = started(recovery, platform)
    number = files.process.pid()
    assert number is not None
    os.kill(number, signal.SIGKILL)
    assert files.process.wait(30)
    assert platform.power(NAME) is Power.OFF
    files.console.unlink()
    platform.start(NAME)
    wait_until(lambda: SAID in platform.console(NAME), "the boot sector has run again")
    # A bitmap that was in use when QEMU was killed tells nothing any more.
    with Monitor(str(files.monitor)) as monitor:
        (row,) = [one for one in monitor.rows("query-named-block-nodes", flat=True) if one["node-name"] == "disk0"]
    assert row["dirty-bitmaps"][0]["inconsistent"]


def test_a_server_that_was_killed_is_started_anew_and_the_guest_goes_on(
    recovery: Recovery, platform: QemuPlatform
) -> None:
    files = started(recovery, platform)
    folder = files.folder.path
    number = int((folder / servant.PID).read_text())
    os.kill(number, signal.SIGKILL)
    wait_until(lambda: not servant.is_running(folder), "the server is gone")
    assert not all(d.hydrated for d in platform.disks(NAME))
    platform.hydrate(NAME)  # starts another, which ends by itself once the disks are whole: perhaps at once
    wait_until(lambda: all(d.hydrated for d in platform.disks(NAME)), "the disks are whole")


def test_hydration_that_was_cut_off_goes_on_with_the_next_start(recovery: Recovery, tmp_path: Path) -> None:
    slow = QemuPlatform(recovery.host, accelerator="tcg", options=(), hydrate_bytes_per_second=65536)
    files = started(recovery, slow)
    try:
        slow.hydrate(NAME)
        assert not all(d.hydrated for d in slow.disks(NAME))
        slow.stop(NAME, force=True)
        assert not all(d.hydrated for d in slow.disks(NAME))
        quick = QemuPlatform(recovery.host, accelerator="tcg", options=())
        quick.start(NAME)
        wait_until(lambda: all(d.hydrated for d in quick.disks(NAME)), "the disks are whole")
        quick.stop(NAME, force=True)
        assert content(files.disk(1), tmp_path) == recovery.sources[1].read_bytes()
    finally:
        slow.delete(NAME)


def test_a_qemu_that_dies_as_hydration_ends_costs_nothing(
    recovery: Recovery, platform: QemuPlatform, tmp_path: Path
) -> None:
    """Its header names no backing file any more by then; which clusters there are may not be written down."""
    files = started(recovery, platform)
    number = files.process.pid()
    assert number is not None
    platform.hydrate(NAME)
    deadline = time.monotonic() + WAIT_SECONDS
    while not overlay.stands_alone(files.disk(1)):  # without a pause: it is the very instant that matters
        assert time.monotonic() < deadline
    os.kill(number, signal.SIGKILL)
    assert files.process.wait(30)
    platform.start(NAME)
    wait_until(lambda: all(d.hydrated for d in platform.disks(NAME)), "the disks are whole")
    wait_until(lambda: not servant.is_running(files.folder.path), "the server has ended by itself")
    platform.stop(NAME, force=True)
    assert content(files.disk(1), tmp_path) == recovery.sources[1].read_bytes()


def test_a_disk_counts_as_hydrated_once_it_was_flushed_or_closed(recovery: Recovery, platform: QemuPlatform) -> None:
    files = started(recovery, platform)
    platform.hydrate(NAME)
    wait_until(lambda: all(d.hydrated for d in platform.disks(NAME)), "the disks are whole")
    wait_until(lambda: not servant.is_running(files.folder.path), "the server has ended by itself")
    marks = sorted(files.folder.path.glob(f"disk-*{overlay.MARK_SUFFIX}"))
    assert [one.stem for one in marks] == ["disk-0", "disk-1"]

    def unmark() -> None:
        for one in marks:
            one.unlink()

    platform.stop(NAME, force=True)  # QEMU closes its disks
    unmark()
    assert all(d.hydrated for d in platform.disks(NAME))

    platform.start(NAME)
    number = files.process.pid()
    assert number is not None
    os.kill(number, signal.SIGKILL)
    assert files.process.wait(30)
    unmark()
    assert not any(d.hydrated for d in platform.disks(NAME))
    platform.start(NAME)
    assert not overlay.stands_alone(files.disk(1)) or overlay.is_hydrated(files.disk(1))
    wait_until(lambda: all(d.hydrated for d in platform.disks(NAME)), "the disks are whole")


def test_define_makes_good_what_an_interruption_left(
    recovery: Recovery, platform: QemuPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = platform.folder(NAME)
    spec = recovery.spec(folder, NAME)
    create = overlay.create
    made: list[Path] = []

    def cut_off(path: Path, disk: DiskSpec) -> None:
        if made:
            raise KeyboardInterrupt
        create(path, disk)
        made.append(path)

    monkeypatch.setattr(overlay, "create", cut_off)
    with pytest.raises(KeyboardInterrupt):
        platform.define(spec)
    assert platform.power(NAME) is Power.GONE
    with pytest.raises(PlatformError, match="there is no machine"):
        platform.start(NAME)
    monkeypatch.setattr(overlay, "create", create)
    platform.define(spec)
    platform.define(spec)  # again: nothing
    assert platform.names() == [NAME]
    assert platform.power(NAME) is Power.OFF
    platform.define(replace(spec, isolated=True))  # another one that never ran: replaced
    assert folder.read().isolated


def test_a_machine_that_ran_is_not_replaced(recovery: Recovery, platform: QemuPlatform) -> None:
    started(recovery, platform)
    spec = platform.folder(NAME).read()
    platform.define(spec)
    with pytest.raises(PlatformError, match="ran already"):
        platform.define(replace(spec, isolated=True))
    platform.stop(NAME, force=True)
    with pytest.raises(PlatformError, match="ran already"):
        platform.define(replace(spec, isolated=True))


def test_a_guest_that_does_not_listen_stays_on_until_it_is_forced(recovery: Recovery, platform: QemuPlatform) -> None:
    started(recovery, platform)
    with pytest.raises(PlatformError, match="did not shut down within 1 s") as caught:
        platform.stop(NAME, timeout_seconds=1)
    assert "--force" in str(caught.value.hint)
    assert platform.power(NAME) is Power.RUNNING
    platform.stop(NAME, force=True)
    platform.stop(NAME)  # again: nothing


def test_a_number_of_another_process_is_never_taken_for_the_machine(
    recovery: Recovery, platform: QemuPlatform, tmp_path: Path
) -> None:
    folder = platform.folder(NAME)
    platform.define(recovery.spec(folder, NAME))
    other = subprocess.Popen([sys.executable, "-c", "input()", str(folder.path)], stdin=subprocess.PIPE)
    try:
        QemuFiles(folder).process.pid_file.write_text(f"{other.pid}\n")
        (folder.path / servant.PID).write_text(f"{other.pid}\n")
        assert platform.power(NAME) is Power.OFF
        assert not servant.is_running(folder.path)
        platform.delete(NAME)
        assert other.poll() is None
    finally:
        other.communicate(b"\n")


def test_another_command_at_work_is_told_of(recovery: Recovery, platform: QemuPlatform) -> None:
    spec = recovery.spec(platform.folder(NAME), NAME)
    platform.define(spec)
    with recovery.host.exclusive(f"machine-qemu-{platform.folder(NAME).path.name}"), pytest.raises(LeaseHeldError):
        platform.start(NAME)


def test_a_store_that_is_gone_is_told_in_a_sentence(recovery: Recovery, platform: QemuPlatform, tmp_path: Path) -> None:
    platform.define(recovery.spec(platform.folder(NAME), NAME))
    (tmp_path / "store").rename(tmp_path / "lost")
    with pytest.raises(PlatformError, match=r"the server of the machine's disks does not start: .*store"):
        platform.start(NAME)
    assert platform.power(NAME) is Power.OFF
    (tmp_path / "lost").rename(tmp_path / "store")
    platform.start(NAME)
    wait_until(lambda: SAID in platform.console(NAME), "the boot sector has run")


def test_a_disk_that_fails_pauses_the_guest_and_start_lets_it_go_on(recovery: Recovery, platform: QemuPlatform) -> None:
    files = started(recovery, platform)
    with Monitor(str(files.monitor)) as monitor:
        monitor.execute("stop")
    assert platform.power(NAME) is Power.PAUSED
    platform.start(NAME)
    assert platform.power(NAME) is Power.RUNNING


def test_the_server_tells_nothing_secret_to_the_disk(
    recovery: Recovery, platform: QemuPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GODWIT_PASSPHRASE", "correct horse battery")
    started(recovery, platform)
    folder = platform.folder(NAME).path
    for path in folder.iterdir():
        if path.is_file():
            assert b"correct horse" not in path.read_bytes(), path
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / servant.CONFIGURATION).stat().st_mode & 0o077 == 0
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(socket_path(folder, servant.SOCKET)))
    assert socket_path(folder, servant.SOCKET).stat().st_mode & 0o077 == 0


def test_a_second_point_takes_the_place_of_the_first(recovery: Recovery, platform: QemuPlatform) -> None:
    folder = platform.folder(NAME)
    recovery.spec(folder, NAME)
    servant.ensure(folder.path)
    first = (folder.path / servant.PID).read_text()
    recovery.spec(folder, NAME)
    servant.ensure(folder.path)
    assert (folder.path / servant.PID).read_text() == first  # the same again: it goes on
    spec = servant.read_spec(folder.path)
    servant.prepare(folder, replace(spec, overlays=("disk-0.qcow2",)))
    assert not servant.is_running(folder.path)
