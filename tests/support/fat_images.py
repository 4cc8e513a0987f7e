"""FAT volumes made by mkfs.vfat, in memory, and what mtools and fsck.vfat say of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

_ENVIRONMENT = {**os.environ, "LC_ALL": "C.UTF-8", "MTOOLS_SKIP_CHECK": "1"}


def make_volume(folder: Path, size: int, *options: str) -> bytearray:
    """Return a volume of ``size`` bytes as mkfs.vfat makes it; its label is GODWIT, its serial number 1234-ABCD."""
    return bytearray(make_volume_file(folder, size, *options).read_bytes())


def make_volume_file(folder: Path, size: int, *options: str) -> Path:
    """Make such a volume in a sparse file; return its path."""
    path = folder / "volume.img"
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    command = ["mkfs.vfat", "--invariant", "-n", "GODWIT", "-i", "1234ABCD", *options, str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def fsck(content: bytes, folder: Path, *options: str) -> tuple[int, str]:
    """Return fsck.vfat's exit code and what it says, changing nothing unless ``options`` ask for it."""
    path = folder / "checked.img"
    path.write_bytes(content)
    done = subprocess.run(["fsck.vfat", *(options or ("-n",)), str(path)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def repaired(content: bytes, folder: Path) -> bytearray:
    """Return the volume as fsck.vfat repairs it without asking."""
    code, said = fsck(content, folder, "-a")
    assert code in {0, 1}, said
    return bytearray((folder / "checked.img").read_bytes())


def mtools(content: bytes, folder: Path, program: str, *arguments: str) -> bytes:
    """Run one of the mtools on a volume that it only reads; return its output."""
    path = folder / "mtools.img"
    path.write_bytes(content)
    command = [program, "-i", str(path), *arguments]
    return subprocess.run(command, check=True, capture_output=True, env=_ENVIRONMENT).stdout


def fill(content: bytearray, folder: Path, files: dict[str, bytes], folders: Iterable[str] = ()) -> None:
    """Put folders and files on a volume with mtools."""
    path = folder / "filled.img"
    path.write_bytes(content)
    for name in folders:
        subprocess.run(["mmd", "-i", str(path), f"::{name}"], check=True, capture_output=True, env=_ENVIRONMENT)
    for name, data in files.items():
        command = ["mcopy", "-i", str(path), "-", f"::{name}"]
        subprocess.run(command, input=data, check=True, capture_output=True, env=_ENVIRONMENT)
    content[:] = path.read_bytes()
