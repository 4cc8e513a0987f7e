"""The qcow2 format, through qemu-img: the one place that runs a program.

Only images that stand by themselves are converted. A qcow2 may name a backing file or an external data file, any
file of this machine, and qemu-img would read it: such an image is refused before qemu-img sees it.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from vhdx.errors import CorruptDiskError, FormatUnknownError, ToolError, UnsupportedDiskError
from vhdx.osfile import OS_FILES, Files
from vhdx.progress import Progress, silent

PROGRAM: Final = "qemu-img"
MAGIC: Final = b"QFI\xfb"
EXTERNAL_DATA_FILE: Final = 1 << 2  # incompatible feature bit
MAX_MESSAGE_BYTES: Final = 2000

_HEADER = struct.Struct(">4sIQIIQ")  # magic, version, backing file offset and length, cluster bits, size
assert _HEADER.size == 32
_FEATURES_OFFSET: Final = 72
_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")


def virtual_size(path: Path | str, *, files: Files = OS_FILES) -> int:
    """Return the virtual size of a qcow2 image that stands by itself, bytes.

    Raises FormatUnknownError, CorruptDiskError, and UnsupportedDiskError for one that builds on another file.
    """
    path = Path(path)
    file = files.open(path)
    try:
        header = file.pread(0, 104)
    finally:
        file.close()
    if not header.startswith(MAGIC):
        raise FormatUnknownError("the file is no qcow2: it does not begin with 'QFI'", path=str(path), offset=0)
    if len(header) < _FEATURES_OFFSET:
        raise CorruptDiskError("the qcow2 header is cut short", path=str(path), offset=0)
    _, version, backing_offset, _, _, size = _HEADER.unpack(header[: _HEADER.size])
    if version not in (2, 3):
        raise UnsupportedDiskError(f"qcow version {version} is not known", path=str(path), offset=4)
    features = int.from_bytes(header[_FEATURES_OFFSET : _FEATURES_OFFSET + 8], "big") if version == 3 else 0
    if backing_offset or features & EXTERNAL_DATA_FILE:
        raise UnsupportedDiskError(
            "this qcow2 builds on another file, which is not followed",
            path=str(path),
            hint="make it stand by itself first: qemu-img convert -O qcow2 SOURCE TARGET",
        )
    return int(size)


def to_raw(source: Path | str, target: Path | str, *, progress: Progress = silent) -> None:
    """Convert a qcow2 to a new, sparse raw file. Raises as ``virtual_size``, and ToolError."""
    size = virtual_size(source)
    _convert(Path(source), "qcow2", Path(target), "raw", size, progress)


def from_raw(source: Path | str, target: Path | str, *, size: int, progress: Progress = silent) -> None:
    """Convert a raw file of ``size`` bytes to a new qcow2. Raises ToolError."""
    _convert(Path(source), "raw", Path(target), "qcow2", size, progress)


def _convert(source: Path, source_format: str, target: Path, target_format: str, size: int, progress: Progress) -> None:
    # Absolute paths: qemu-img takes "json:..." and "nbd:..." for something other than a file's name.
    names = [str(source.absolute()), str(target.absolute())]
    arguments = ["convert", "-p", "-f", source_format, "-O", target_format, *names]

    def listen(percent: float) -> None:
        progress(int(size * percent / 100), size, f"converting {source_format} to {target_format}")

    _run(arguments, listen)


def _run(arguments: Sequence[str], listen: Callable[[float], None]) -> None:
    program = shutil.which(PROGRAM)
    if program is None:
        raise ToolError(
            f"{PROGRAM} is needed for qcow2, and is not installed",
            hint="install qemu-utils (qemu-img), or use another format",
        )
    try:
        process = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
    except OSError as error:
        raise ToolError(f"{program} cannot be run: {error.strerror or error}") from error
    tail = b""
    with process:
        assert process.stdout is not None
        try:
            while piece := process.stdout.read(4096):
                tail = (tail + piece)[-MAX_MESSAGE_BYTES:]
                if found := _PERCENT.findall(piece):
                    listen(float(found[-1]))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        message = _PERCENT.sub(b"", tail).decode("utf-8", "replace").strip()
        raise ToolError(f"{PROGRAM} failed with code {process.returncode}: {message or 'it gave no reason'}")
