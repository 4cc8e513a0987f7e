"""A running QEMU with disks and no guest: what a guest would write is written through the devices, by its monitor."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from replica.monitor import Monitor, MonitorGoneError
from replica.qemu import LiveAddress

QEMU = "qemu-system-x86_64"


def missing() -> list[str]:
    """What is not installed."""
    return [program for program in (QEMU, "qemu-img") if shutil.which(program) is None]


class RunningQemu:
    """A machine whose processor never starts, with disks ``d0``, ``d1``… as block nodes of virtio devices.

    It has two monitors: the one under test, and one by which tests act as the guest and as the administrator.
    """

    def __init__(self, folder: Path, formats: tuple[str, ...], size: int) -> None:
        self.folder = folder
        self.socket = str(folder / "qmp.sock")
        self.size = size
        self.formats = formats
        self.images = [folder / f"d{number}.{name}" for number, name in enumerate(formats)]
        self._process: subprocess.Popen[bytes] | None = None
        for image, name in zip(self.images, formats, strict=True):
            command = ["qemu-img", "create", "-q", "-f", name, str(image), str(size)]
            subprocess.run(command, check=True)
        self.model = [bytearray(size if size < 1 << 30 else 0) for _ in formats]  # larger disks are written by hand

    def addresses(self, agent: str | None = None) -> list[str]:
        """Return the disks as they are protected."""
        return [str(LiveAddress(self.socket, f"d{number}", agent)) for number in range(len(self.formats))]

    def start(self) -> None:
        """Start the process, and wait until its monitor answers."""
        command = [QEMU, "-machine", "q35,accel=tcg", "-m", "32", "-S", "-nodefaults", "-display", "none"]
        for name in ("qmp", "control"):
            command += ["-qmp", f"unix:{self.folder / f'{name}.sock'},server=on,wait=off"]
        for number, (image, name) in enumerate(zip(self.images, self.formats, strict=True)):
            node = f"driver={name},node-name=d{number},file.driver=file,file.filename={image},discard=unmap"
            command += ["-blockdev", f"{node},file.discard=unmap"]
            command += ["-device", f"virtio-blk-pci,drive=d{number},id=v{number}"]
        self._process = subprocess.Popen(command, stderr=sys.stderr)
        deadline = time.monotonic() + 60
        while True:
            try:
                self._control = Monitor(str(self.folder / "control.sock"))
            except MonitorGoneError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.05)
            else:
                return

    def stop(self, *, kill: bool = False) -> None:
        """End the process."""
        if self._process is not None:
            if kill:
                self._process.kill()
            else:
                self.control("quit")
            self._process.wait()
            self._control.close()
            self._process = None

    def control(self, command: str, **arguments: Any) -> Any:
        """Run a monitor command, as the administrator."""
        return self._control.execute(command, **arguments)

    def write(self, number: int, offset: int, length: int, value: int) -> None:
        """Write as the guest would, and in the model."""
        self._io(number, f"write -q -P {value} {offset} {length}")
        self.model[number][offset : offset + length] = bytes([value]) * length

    def discard(self, number: int, offset: int, length: int) -> None:
        """Make a range zeros as the guest would, and in the model."""
        self._io(number, f"write -q -z -u {offset} {length}")
        self.model[number][offset : offset + length] = bytes(length)

    def state(self) -> tuple[bytes, ...]:
        """Return what the disks hold now."""
        return tuple(bytes(one) for one in self.model)

    def ours(self) -> list[str]:
        """Return the names of nodes, jobs and exports that replication has put into the process."""
        rows = [
            ("query-named-block-nodes", "node-name"),
            ("query-jobs", "id"),
            ("query-block-exports", "id"),
        ]
        found = [str(row.get(name)) for command, name in rows for row in self._control.rows(command)]
        return [name for name in found if name.startswith("godwit")]

    def bitmaps(self, number: int = 0) -> list[str]:
        """Return the names of the bitmaps of a disk."""
        for row in self._control.rows("query-named-block-nodes", flat=True):
            if row["node-name"] == f"d{number}":
                return sorted(bitmap["name"] for bitmap in row.get("dirty-bitmaps", ()))
        raise AssertionError(number)

    def _io(self, number: int, command: str) -> None:
        device = f"/machine/peripheral/v{number}/virtio-backend"
        said = self.control("human-monitor-command", command_line=f'qemu-io -d {device} "{command}"')
        assert not re.search(r"error|failed|conflict", str(said), re.IGNORECASE), said

    def __enter__(self) -> RunningQemu:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop(kill=True)
