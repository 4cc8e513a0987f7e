"""Makes small Linux file systems in files, by the tools that Linux itself uses, with neither root nor a mount."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class FileDevice:
    """A file, or a stretch of one, as a block device. Reads outside of it fail the test."""

    sector_size = 512

    def __init__(self, content: bytes | Path) -> None:
        self._content = content
        self.size = len(content) if isinstance(content, bytes) else content.stat().st_size

    def read_at(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        if isinstance(self._content, bytes):
            return self._content[offset : offset + length]
        with self._content.open("rb") as file:
            file.seek(offset)
            return file.read(length)


class DamagedDevice:
    """Another device of which some bytes are other ones, and that may end early."""

    sector_size = 512

    def __init__(self, device: FileDevice, changed: dict[int, int], size: int | None = None) -> None:
        self._device = device
        self._changed = changed
        self.size = device.size if size is None else size

    def read_at(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        data = bytearray(self._device.read_at(offset, length))
        for at, value in self._changed.items():
            if offset <= at < offset + length:
                data[at - offset] = value
        return bytes(data)


def run(*command: str | Path, stdin: str = "") -> str:
    """Run a tool and return what it prints; skip the test where it is not installed."""
    if shutil.which(str(command[0]), path=_PATH) is None:
        pytest.skip(f"{command[0]} is not installed")
    environment = {**os.environ, "PATH": _PATH, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [str(part) for part in command], check=False, input=stdin, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def sample_tree(folder: Path, *, names: int = 200) -> Path:
    """Fill a folder with what a reader can stumble over: sizes, holes, links, long names, many names."""
    chance = random.Random(7)
    (folder / "etc").mkdir(parents=True)
    (folder / "many").mkdir()
    (folder / "etc/hostname").write_text("guest\n")
    (folder / "empty").write_bytes(b"")
    (folder / "short").write_bytes(b"0123456789" * 10)
    (folder / "block").write_bytes(chance.randbytes(4096))
    (folder / "large").write_bytes(chance.randbytes(700_001))
    with (folder / "sparse").open("wb") as file:
        file.seek(300_000)
        file.write(b"behind a hole")
    for number in range(names):
        (folder / f"many/a name that makes folders large, number {number}").write_text(f"{number}\n")
    (folder / "gr\u00fc\u00dfe").write_text("utf-8\n")
    (folder / "relative").symlink_to("etc/hostname")
    (folder / "etc/absolute").symlink_to("/relative")
    (folder / "etc/upwards").symlink_to("../../../etc/../etc/hostname")
    (folder / "long").symlink_to("./" * 60 + "etc/hostname")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    return folder


def check_tree(file_system: object, folder: Path, prefix: str = "") -> None:
    """Compare everything that a reader finds with the folder a file system was made from."""
    from conversion.filesystems.filesystem import FileSystem  # noqa: PLC0415

    reader: FileSystem = file_system  # type: ignore[assignment]
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]:
        inside = f"{prefix}/{path.relative_to(folder)}"
        listed = reader.list_folder(inside)
        assert listed is not None, inside
        found = {entry.name: (entry.kind, entry.size) for entry in listed if entry.name != "lost+found"}
        wanted = {
            item.name: ("link", 0)
            if item.is_symlink()
            else ("folder", 0)
            if item.is_dir()
            else ("file", item.stat().st_size)
            for item in path.iterdir()
        }
        assert found == wanted
        for item in path.iterdir():
            if item.is_file() and not item.is_symlink():
                assert reader.read_file(f"{inside}/{item.name}") == item.read_bytes(), item


def check_links(reader: object, prefix: str = "") -> None:
    """Check the links of ``sample_tree``."""
    from conversion.filesystems.filesystem import FileSystem  # noqa: PLC0415

    system: FileSystem = reader  # type: ignore[assignment]
    for name in ("relative", "etc/absolute", "etc/upwards"):
        assert system.read_file(f"{prefix}/{name}") == b"guest\n", name
    for name in ("loop", "dangling", "nowhere", "etc", "short/below", "etc/hostname/x", "\udfff"):
        assert system.read_file(f"{prefix}/{name}") is None, name
    assert system.list_folder(f"{prefix}/short") is None
    assert system.list_folder(f"{prefix}/nothing") is None
