"""What the Linux kernel makes of a partition table: an image as a loop device, its partitions as /sys tells them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.support.debian_guest import PATH

LOSETUP = shutil.which("losetup", path=PATH)


@cache
def missing() -> str:
    """Why the kernel cannot be asked here; empty where it can."""
    if sys.platform == "win32" or LOSETUP is None or os.geteuid() != 0:
        return "loop devices take root and losetup"
    with tempfile.TemporaryDirectory(prefix="godwit-loop-") as folder:
        probe = Path(folder) / "probe.img"
        with probe.open("wb") as file:  # one partition, of sectors 1 and 2
            file.write(bytes(446) + b"\0\0\0\0\x83\0\0\0" + b"\1\0\0\0\2\0\0\0" + bytes(48) + b"\x55\xaa" + bytes(4096))
        try:
            found = partitions(probe)
        except subprocess.CalledProcessError as error:
            return f"this kernel gives no loop devices: {error.stderr.strip()}"
    return "" if found == {1: (1, 2)} else "this kernel looks for no partitions on loop devices"


def partitions(image: Path) -> dict[int, tuple[int, int]]:
    """Return start and length in sectors of the partitions that the kernel finds on ``image``, by number."""
    assert LOSETUP is not None
    attach = [LOSETUP, "--find", "--show", "--partscan", "--read-only", str(image)]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        folder = Path("/sys/class/block") / Path(device).name
        found = {}
        for one in folder.glob(f"{folder.name}p*"):
            match = re.fullmatch(rf"{folder.name}p(\d+)", one.name)
            if match is not None:
                start, size = (int((one / name).read_text()) for name in ("start", "size"))
                found[int(match[1])] = (start, size)
        return found
    finally:
        subprocess.run([LOSETUP, "--detach", device], check=True, capture_output=True)
