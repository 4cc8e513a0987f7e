"""Which format a file is, and opening it by that: the one door to disks of any kind."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from vhdx.chain import open_vhdx
from vhdx.disk import Disk
from vhdx.errors import CorruptDiskError, FormatUnknownError, UnsupportedDiskError
from vhdx.osfile import OS_FILES, File, Files, translated
from vhdx.raw import RawDisk
from vhdx.structures import HEADER_OFFSETS, REGION_TABLE_OFFSETS, FileIdentifier
from vhdx.vhd import VhdDisk, open_vhd
from vhdx.vhd_structures import FOOTER_COOKIE, FOOTER_SIZE, HEADER_COOKIE, OLD_FOOTER_SIZE
from vhdx.vhdx import VhdxDisk
from vhdx.writer import open_writable

Format: TypeAlias = Literal["vhdx", "vhd", "qcow2", "raw"]
OpenDisk: TypeAlias = VhdxDisk | VhdDisk | RawDisk

QCOW2_MAGIC: Final = b"QFI\xfb"
SECTOR_SIZE: Final = 512

# What a file's name promises: a file that does not keep it is damaged or misnamed, and is not taken for raw bytes.
_PROMISES: Final[dict[str, Format]] = {
    ".vhdx": "vhdx",
    ".avhdx": "vhdx",
    ".vhd": "vhd",
    ".avhd": "vhd",
    ".qcow2": "qcow2",
}

_FOREIGN: Final = (
    (0, b"KDMV", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"QED\0", "QED"),
)


def detect_format(path: Path | str, *, files: Files = OS_FILES) -> Format:
    """Return the format of the image at ``path``, from its content.

    Raw is what has no identifier of a known format, is whole sectors, and does not claim another format by its name.
    Raises CorruptDiskError where other structures say that an identifier is damaged, UnsupportedDiskError for formats
    known but not read, FormatUnknownError, OsError.
    """
    refuse_special(path)
    file = files.open(Path(path))
    try:
        return _detect(file)
    finally:
        file.close()


def refuse_special(path: Path | str) -> None:
    """Raise FormatUnknownError for a folder, and for what would block or act when it is opened: a pipe, a device…"""
    with translated(path, "open the file"):
        mode = Path(path).stat().st_mode if os.path.lexists(path) else stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise FormatUnknownError("this is a folder, and no disk image", path=str(path), hint="name the image in it")
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode):
        raise FormatUnknownError("this is a pipe, a socket or a device, and no disk image", path=str(path))


def _detect(file: File) -> Format:
    path = str(file.path)
    size = file.size()
    start = file.pread(0, FOOTER_SIZE)
    if start.startswith(FileIdentifier.SIGNATURE):
        return "vhdx"
    if start.startswith(QCOW2_MAGIC):
        return "qcow2"
    footers = (file.pread(max(0, size - length), len(FOOTER_COOKIE)) for length in (FOOTER_SIZE, OLD_FOOTER_SIZE))
    if start.startswith(FOOTER_COOKIE) or FOOTER_COOKIE in footers:
        return "vhd"
    for offset, magic, name in _FOREIGN:
        if start[offset:].startswith(magic):
            raise UnsupportedDiskError(
                f"{name} images are not read",
                path=path,
                hint="convert it first: qemu-img convert -O vhdx SOURCE TARGET",
            )
    _refuse_damaged(file)
    if not size:
        raise FormatUnknownError("the file is empty", path=path)
    if size % SECTOR_SIZE:
        raise FormatUnknownError(
            f"this is no disk image: it has no identifier of one, and {size} bytes are no whole sectors", path=path
        )
    promised = _PROMISES.get(file.path.suffix.lower())
    if promised is not None:
        raise FormatUnknownError(
            f"the name says {promised.upper()}, but there is no identifier of that format in the file",
            path=path,
            hint="it is damaged, incomplete or misnamed; name the format raw if it holds a disk's plain bytes",
        )
    return "raw"


def _refuse_damaged(file: File) -> None:
    """Raise CorruptDiskError where the file is a VHDX or a VHD but for its identifier."""
    path = str(file.path)
    headers = [file.pread(offset, 4) for offset in HEADER_OFFSETS]
    regions = [file.pread(offset, 4) for offset in REGION_TABLE_OFFSETS]
    if b"head" in headers and b"regi" in regions:
        raise CorruptDiskError("the file identifier of this VHDX is damaged", path=path, offset=0)
    if file.pread(FOOTER_SIZE, len(HEADER_COOKIE)) == HEADER_COOKIE:
        raise CorruptDiskError("both footers of this VHD are damaged or missing", path=path, offset=0)


def open_disk(
    path: Path | str,
    *,
    writable: bool = False,
    format: str | None = None,  # noqa: A002 - what everyone calls it
    allowed_folders: Sequence[Path | str] = (),
    files: Files = OS_FILES,
) -> OpenDisk:
    """Open a disk image of any format that can be read here, its parents included.

    ``format`` is detected where it is None. Parents of a differencing disk must lie in the image's own folder or in
    one of ``allowed_folders``; they are opened for reading. qcow2 is refused: ``vhdx.convert`` converts it.
    Raises FormatUnknownError, CorruptDiskError, UnsupportedDiskError, ParentError, OsError, DiskBusyError.
    """
    refuse_special(path)
    known = format or detect_format(path, files=files)
    if known == "vhdx":
        if writable:
            return open_writable(path, allowed_folders=allowed_folders, files=files)
        return open_vhdx(path, allowed_folders=allowed_folders, files=files)
    if known == "vhd":
        return open_vhd(path, writable=writable, allowed_folders=allowed_folders, files=files)
    if known == "raw":
        return RawDisk.open(path, writable=writable, files=files)
    if known == "qcow2":
        raise UnsupportedDiskError(
            "qcow2 images are not opened in place", path=str(path), hint="convert it first, to vhdx or raw"
        )
    raise UnsupportedDiskError(f"there is no format {known!r}: choose from {', '.join(get_args(Format))}")


def chain_of(disk: Disk) -> tuple[Path, ...]:
    """Return the files that a disk reads from: its own, its parent's, and so on."""
    chain = getattr(disk, "chain", (disk,))
    return tuple(link.path for link in chain)
