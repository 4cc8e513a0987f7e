"""The qcow2 format, through qemu-img and qemu-io: the one place that runs them.

Only images that stand by themselves are converted. A qcow2 may name a backing file or an external data file, any
file of this machine, and qemu-img would read it: such an image is refused before qemu-img sees it.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from vhdx.errors import CorruptDiskError, FormatUnknownError, ToolError, UnsupportedDiskError
from vhdx.osfile import OS_FILES, Files
from vhdx.progress import Progress, silent

PROGRAM: Final = "qemu-img"
WRITER: Final = "qemu-io"
LARGEST_BACKING_NAME: Final = 1023  # as the format says, bytes
LONGEST_BACKING_CHAIN: Final = 64
RANGES_A_CALL: Final = 500
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


def backing_chain(path: Path | str, folders: Sequence[Path | str] = (), *, files: Files = OS_FILES) -> list[Path]:
    """Return the image and every file it builds on, the image first; the last may be of another format.

    A backing file must lie in the folder of the image that names it or in one of ``folders``, as a plain file name or
    path: QEMU would open any file or address that an image names. Raises UnsupportedDiskError, CorruptDiskError.
    """
    chain = [Path(path)]
    while True:
        last = chain[-1]
        file = files.open(last)
        try:
            header = file.pread(0, 104)
            if not header.startswith(MAGIC):
                return chain
            if len(header) < _FEATURES_OFFSET:
                raise CorruptDiskError("the qcow2 header is cut short", path=str(last), offset=0)
            _, version, offset, length, _, _ = _HEADER.unpack(header[: _HEADER.size])
            features = int.from_bytes(header[_FEATURES_OFFSET : _FEATURES_OFFSET + 8], "big") if version == 3 else 0
            if version not in (2, 3) or features & EXTERNAL_DATA_FILE:
                raise UnsupportedDiskError("this qcow2 has an external data file or an unknown version", path=str(last))
            if not offset:
                return chain
            if length > LARGEST_BACKING_NAME:
                raise CorruptDiskError("the name of the backing file is too long", path=str(last), offset=offset)
            name = file.pread(offset, length)
        finally:
            file.close()
        chain.append(_backing(last, name, folders))
        if len(chain) > LONGEST_BACKING_CHAIN or len({item.resolve() for item in chain}) < len(chain):
            raise CorruptDiskError("the chain of backing files has no end", path=str(path))


def _backing(path: Path, name: bytes, folders: Sequence[Path | str]) -> Path:
    hint = "move it there, or allow its folder"
    try:
        text = name.decode()
    except UnicodeDecodeError as error:
        raise UnsupportedDiskError("the name of the backing file is no text", path=str(path)) from error
    # QEMU takes what stands before a colon for a protocol, "json:" and "nbd:" among them.
    if "\0" in text or ":" in text.partition("/")[0]:
        raise UnsupportedDiskError(f"its backing file {text!r} is no file of this machine", path=str(path))
    target = path.parent / text
    allowed = [path.parent, *map(Path, folders)]
    if not any(target.resolve().is_relative_to(folder.resolve()) for folder in allowed):
        raise UnsupportedDiskError(f"its backing file {text!r} lies in another folder", path=str(path), hint=hint)
    if not target.is_file():
        raise UnsupportedDiskError(f"its backing file {text!r} is not there", path=str(path), hint=hint)
    return target


def create_overlay(path: Path | str, backing: Path | str, backing_format: str, size: int) -> None:
    """Make a new qcow2 at ``path`` over ``backing``, which must lie in the same folder. Raises ToolError."""
    path, backing = Path(path), Path(backing)
    names = ["-b", backing.name, "-F", backing_format, str(path.absolute()), str(size)]
    _run([_program(PROGRAM), "create", "-q", "-f", "qcow2", *names], folder=path.parent)


def write_ranges(path: Path | str, ranges: Iterable[tuple[int, bytes]]) -> None:
    """Write each (offset, data) into a qcow2, in their order, durably. Raises ToolError."""
    program = _program(WRITER)
    with tempfile.TemporaryDirectory(prefix="godwit-") as folder:
        commands: list[str] = []
        for number, (offset, data) in enumerate(ranges):
            content = Path(folder) / str(number)
            content.write_bytes(data)
            commands += ["-c", f"write -q -s {content} {offset} {len(data)}"]
        for start in range(0, len(commands), 2 * RANGES_A_CALL):
            batch = commands[start : start + 2 * RANGES_A_CALL]
            _run([program, "-f", "qcow2", *batch, "-c", "flush", str(Path(path).absolute())])


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

    _run([_program(PROGRAM), *arguments], listen)


def _program(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        raise ToolError(
            f"{name} is needed for qcow2, and is not installed",
            hint=f"install qemu-utils ({name}), or use another format",
        )
    return program


def _run(command: Sequence[str], listen: Callable[[float], None] | None = None, *, folder: Path | None = None) -> None:
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, cwd=folder
        )
    except OSError as error:
        raise ToolError(f"{command[0]} cannot be run: {error.strerror or error}") from error
    tail = b""
    with process:
        assert process.stdout is not None
        try:
            while piece := process.stdout.read(4096):
                tail = (tail + piece)[-MAX_MESSAGE_BYTES:]
                if listen is not None and (found := _PERCENT.findall(piece)):
                    listen(float(found[-1]))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        message = _PERCENT.sub(b"", tail).decode("utf-8", "replace").strip()
        name = Path(command[0]).name
        raise ToolError(f"{name} failed with code {process.returncode}: {message or 'it gave no reason'}")
