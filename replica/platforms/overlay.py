"""A machine's own disk: a qcow2 over an NBD export or a file, which becomes whole by hydration; made by qemu-img.

QEMU's copying ends with a header that names no backing file any more, but which clusters the disk has may be in QEMU's
memory alone by then. So a disk counts as hydrated once QEMU flushed it after that, or closed it in order, which a mark
beside it says. One that has no mark when its QEMU is gone is put on its backing again: what was not written down is
there.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from replica.errors import PlatformError
from replica.nbd.wire import Address, TcpAddress, UnixAddress
from replica.platforms.platform import DiskSpec
from vhdx.osfile import fsync_folder

PROGRAM: Final = "qemu-img"
MARK_SUFFIX: Final = ".whole"
SECONDS: Final = 120.0
# A server that ended is waited for this long before the guest is told (and stopped): time to start another.
RECONNECT_SECONDS: Final = 30
BITMAP_GRANULARITY_BYTES: Final = 65536

_HEADER = struct.Struct(">4sIQ")  # magic, version, place of the backing file's name
assert _HEADER.size == 16


def disk_name(number: int) -> str:
    """Return the name of the file of a machine's own disk, in its folder."""
    return f"disk-{number}.qcow2"


def backing_node(disk: DiskSpec) -> dict[str, Any]:
    """Return the node below the machine's own disk. Raises PlatformError."""
    if disk.url is not None:
        return {"driver": "raw", "read-only": True, "file": _nbd(disk.url)}
    if disk.path is None:
        raise PlatformError(f"disk {disk.number} is given neither as an address nor as a file")
    file = {"driver": "file", "filename": str(disk.path), "read-only": True}
    if disk.format == "vhd":  # by its header's size: QEMU would reckon with cylinders, heads and sectors
        return {"driver": "vpc", "force-size-calc": "current_size", "read-only": True, "file": file}
    return {"driver": disk.format, "read-only": True, "file": file}


def nbd_address(url: str) -> tuple[Address, str]:
    """Return the server and the export that an address names. Raises PlatformError."""
    hint = "write nbd+unix:///EXPORT?socket=PATH or nbd://HOST:PORT/EXPORT"
    try:
        parts = urlsplit(url)
        port = parts.port or 10809
    except ValueError as error:
        raise PlatformError(f"{url!r} is no NBD address: {error}", hint=hint) from error
    sockets = parse_qs(parts.query).get("socket", [])
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix" and len(sockets) == 1:
        return UnixAddress(sockets[0]), export
    if parts.scheme == "nbd" and parts.hostname:
        return TcpAddress(parts.hostname, port), export
    raise PlatformError(f"{url!r} is no NBD address", hint=hint)


def _nbd(url: str) -> dict[str, Any]:
    address, export = nbd_address(url)
    if isinstance(address, UnixAddress):
        server = {"type": "unix", "path": address.path}
    else:
        server = {"type": "inet", "host": address.host, "port": str(address.port)}
    return {
        "driver": "nbd",
        "server": server,
        "export": export,
        "reconnect-delay": RECONNECT_SECONDS,
        "open-timeout": RECONNECT_SECONDS,
        "read-only": True,
    }


def create(path: Path, disk: DiskSpec) -> None:
    """Make the machine's own disk at ``path``: empty, over what it is made over, its bitmap recording.

    What is below is not opened. Raises PlatformError.
    """
    backing_node(disk)  # raises before anything is made
    _run("create", "-q", "-f", "qcow2", str(path), str(disk.size))
    if disk.bitmap is not None:
        _run("bitmap", "-f", "qcow2", "--add", "-g", str(BITMAP_GRANULARITY_BYTES), str(path), disk.bitmap)
    # Only now: the bitmap's maker would open the backing file.
    lean_back(path, disk)


def is_hydrated(path: Path) -> bool:
    """Whether the machine's own disk stands by itself for good, whatever becomes of its QEMU. Raises PlatformError."""
    return stands_alone(path) and _mark(path).exists()


def settle(path: Path) -> None:
    """Note that a disk that stands alone was flushed since. Raises PlatformError."""
    try:
        _mark(path).touch()
        fsync_folder(path.parent)
    except OSError as error:
        raise PlatformError(f"cannot note that the disk is whole: {error.strerror}", path=str(path)) from error


def unsettled(paths: Mapping[int, Path]) -> dict[int, Path]:
    """Return the disks, by number, that stand alone, but are not known to be flushed since. Raises PlatformError."""
    return {number: path for number, path in paths.items() if stands_alone(path) and not _mark(path).exists()}


def settle_closed(paths: Mapping[int, Path]) -> None:
    """Settle those disks, of a machine that is off, which QEMU closed in order. Raises PlatformError."""
    for path in unsettled(paths).values():
        if _is_closed_in_order(path):
            settle(path)


def _is_closed_in_order(path: Path) -> bool:
    """Whether the last QEMU that wrote to a disk closed it: it says so of its bitmaps. False where that has none."""
    about = json.loads(_run("info", "-U", "--output=json", "-f", "qcow2", str(path)))
    bitmaps = about.get("format-specific", {}).get("data", {}).get("bitmaps", ())
    return bool(bitmaps) and not any("in-use" in one["flags"] for one in bitmaps)


def lean_back(path: Path, disk: DiskSpec) -> None:
    """Put a disk that no QEMU has open on its backing again, its own clusters as they are. Raises PlatformError."""
    node = backing_node(disk)
    _run("rebase", "-q", "-u", "-f", "qcow2", "-F", node["driver"], "-b", f"json:{json.dumps(node)}", str(path))


def _mark(path: Path) -> Path:
    return path.with_suffix(MARK_SUFFIX)


def stands_alone(path: Path) -> bool:
    """Whether the header of the machine's own disk names no backing file. Raises PlatformError."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise PlatformError(f"cannot read the machine's disk: {error.strerror}", path=str(path)) from error
    if len(head) < _HEADER.size or not head.startswith(b"QFI\xfb"):
        raise PlatformError("the machine's disk is no qcow2 any more", path=str(path), hint="delete the machine")
    return bool(_HEADER.unpack(head)[2] == 0)


def _run(*arguments: str) -> bytes:
    program = shutil.which(PROGRAM)
    if program is None:
        raise PlatformError(f"{PROGRAM} is needed and not installed", hint="install qemu-utils")
    try:
        done = subprocess.run(
            [program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False
        )
    except (OSError, ValueError) as error:
        raise PlatformError(f"{program} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise PlatformError(f"{PROGRAM} {arguments[0]} does not end") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[:2000]
        raise PlatformError(f"{PROGRAM} {arguments[0]} failed: {said}", path=arguments[-1])
    return done.stdout
